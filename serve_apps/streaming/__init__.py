"""The way from tokens to text and from text to events."""
