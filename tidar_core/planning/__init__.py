"""The choice of a decode mode: latencies, acceptance rates, the planner, benchmarks."""
