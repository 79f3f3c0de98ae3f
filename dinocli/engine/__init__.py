"""Engine: trains any `method.Method`, and knows nothing else about it."""
