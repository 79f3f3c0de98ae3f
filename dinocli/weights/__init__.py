"""Weights in and out: checkpoints, released weights, frozen teachers and export."""
