"""Rules that turn text into tokens and back: tokenizers, chat templates, conversations, grammars, prompts."""
