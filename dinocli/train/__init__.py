"""Pretraining runs: plan, loop, states, logs and failure checks."""
