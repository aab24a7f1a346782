"""The whole pipeline by one command, on one machine and without input."""
