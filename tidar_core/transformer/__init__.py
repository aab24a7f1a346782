"""The model, its attention and its key-value cache."""
