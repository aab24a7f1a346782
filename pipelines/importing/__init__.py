"""Import of models from elsewhere: GGUF files, packages that carry them, and dual-mode checkpoints."""
