"""Evaluations: one per file; features or pixels in, a frozen result out."""
