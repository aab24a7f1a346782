"""From a bundle to a report, and from a report to a registry version."""
