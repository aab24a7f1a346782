"""The HTTP service: a bundle behind OpenAI's completions API, on Ray Serve."""
