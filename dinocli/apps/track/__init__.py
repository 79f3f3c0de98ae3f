"""Tracking of a first frame's masks through a video."""
