"""From a corpus to packed shards."""
