"""Classification of photos by a saved classifier."""
