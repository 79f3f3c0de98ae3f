"""Evaluations: one a file; values in, a frozen result out."""
