"""Sharing weights: the model card and the upload to a hub."""
