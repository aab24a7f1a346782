"""The Ray cluster of a job: connection, progress, terminal output."""
