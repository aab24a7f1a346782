"""The HTTP side of the service: requests, limits, failover, responses."""
