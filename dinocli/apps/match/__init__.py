"""Correspondences between two photos."""
