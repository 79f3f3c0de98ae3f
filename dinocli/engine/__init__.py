"""The engine: trains what `method.Method` describes, and knows nothing of what that is."""
