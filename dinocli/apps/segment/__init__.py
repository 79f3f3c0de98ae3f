"""Segments without and with labels: foreground, objects, parts and masks."""
