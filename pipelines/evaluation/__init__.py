"""Evaluation: a bundle gets a report, and a good report makes a registry version."""
