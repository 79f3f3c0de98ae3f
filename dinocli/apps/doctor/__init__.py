"""Checks of images, preset, machine and installation before a long run."""
