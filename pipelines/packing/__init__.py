"""Packing: a corpus becomes packed shards."""
