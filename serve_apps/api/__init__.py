"""Bodies of requests and responses: pydantic models and plain values, without Ray and torch."""
