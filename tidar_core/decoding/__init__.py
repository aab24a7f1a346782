"""The decoder: requests, plans, pages, sampling, verification, the scheduler."""
