"""Things at rest: tokenizer, shards, weights, bundle, registry, locations. No ray, no http."""
