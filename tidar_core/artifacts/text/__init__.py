"""Text at rest: tokenizers, chat templates, conversations, grammars, prompts."""
