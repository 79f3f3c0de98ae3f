"""Comparison of networks: figures on the same images, verdicts with intervals, and a page."""
