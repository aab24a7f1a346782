"""Training: shards become a bundle."""
