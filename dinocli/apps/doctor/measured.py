"""Measured runs on a CPU: the accuracy to expect from a preset after a number of steps."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Measured:
    """Result of runs on labelled images.

    Attributes:
        images: Images, in words.
        preset: Name of the preset.
        epochs: Epochs of 50 steps of 48 images.
        minutes: Processor minutes.
        knn: Lowest and highest k-NN accuracy (k = 20) of the runs, in percent.
        untrained: k-NN accuracy of the untrained network, in percent.
        seeds: Number of runs.
    """

    images: str
    preset: str
    epochs: int
    minutes: float
    knn: tuple[float, float]
    untrained: float
    seeds: int


PHOTOS = "9,469 photos of ten classes (Imagenette, 128 pixels)"
# One core of a Xeon with AMX, 2026-11-29; commands in docs/results.md, "tiny: most learning in a minute".
MEASURED = (
    Measured(PHOTOS, "tiny", 12, 2.5, (43.1, 44.0), 32.9, 3),
    Measured(PHOTOS, "tiny", 40, 9, (51.2, 51.2), 32.9, 1),
)


def describe(preset: str) -> str:
    """Return what runs of a preset have reached, in one line; empty if none was measured."""
    rows = [row for row in MEASURED if row.preset == preset]
    if not rows:
        return ""
    reached = ", ".join(f"{_format(row.knn)} with --epochs {row.epochs} ({row.minutes:g} core minutes)" for row in rows)
    first = rows[0]
    return f"measured on {first.images}, k-NN in %: {first.untrained:g} untrained, {reached}"


def _format(knn: tuple[float, float]) -> str:
    low, high = knn
    return f"{low}" if low == high else f"{low} to {high}"
