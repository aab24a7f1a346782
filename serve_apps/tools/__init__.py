"""Commands beside the service: benchmark, smoke test, generation without a service."""
