"""The mathematics of TiDAR: torch and the standard library, nothing else."""
