"""A decoder replica: its engines, their processes, the decode loop."""
