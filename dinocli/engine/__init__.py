"""Engine: training of any `method.Method`, through that interface alone."""
