"""Models at rest: Hugging Face folders, bundles, latency tables."""
