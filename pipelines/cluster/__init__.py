"""The Ray cluster of a job: connection and progress."""
