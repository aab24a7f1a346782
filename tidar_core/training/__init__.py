"""Dual-mode training: rows, layouts, losses, schedules, the trainer of one device."""
