"""What clients send and get: pydantic models and plain values, without Ray and torch."""
