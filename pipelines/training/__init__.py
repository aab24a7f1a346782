"""From shards to a bundle."""
