"""Features: networks as encoders, extraction, and the files that hold features."""
