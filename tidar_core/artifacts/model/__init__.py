"""Stored models: Hugging Face folders, bundles and latency tables."""
