"""Attention maps of photos and videos."""
