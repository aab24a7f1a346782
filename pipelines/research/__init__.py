"""Experiments: recipes and token slots compared at equal budget."""
