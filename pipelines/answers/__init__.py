"""Answers of a checkpoint to prompts: text that the model writes itself, as conversations for pack."""
