"""Measured runs on a CPU: the accuracy to expect from a preset, by number of images and minutes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dinocli.core.errors import DinoError


@dataclass(frozen=True)
class Measured:
    """Result of runs on labelled images.

    Attributes:
        images: Number of images to train on.
        data: Images, in words.
        preset: Name of the preset.
        epochs: Epochs of 50 steps of 48 images.
        minutes: Processor minutes of one core.
        knn: Lowest and highest k-NN accuracy (k = 20) of the runs, in percent.
        untrained: k-NN accuracy of the untrained network, in percent.
        seeds: Number of runs.
    """

    images: int
    data: str
    preset: str
    epochs: int
    minutes: float
    knn: tuple[float, float]
    untrained: float
    seeds: int


_FEW = (996, "Imagenette, 1,000 images")
_PHOTOS = (9_469, "Imagenette, ten classes")
_SMALL = (50_000, "CIFAR-10")
# Commands, machines and dates are in docs/results.md, "`tiny`: most learning in a minute".
MEASURED = (
    Measured(*_FEW, "tiny", 13, 2.5, (35.4, 35.4), 26.8, 1),
    Measured(*_FEW, "tiny", 44, 9, (43.4, 43.4), 26.8, 1),
    Measured(*_PHOTOS, "tiny-muon", 9, 2.2, (44.6, 44.7), 32.9, 3),
    Measured(*_PHOTOS, "tiny", 40, 9, (51.2, 51.2), 32.9, 1),
    Measured(*_PHOTOS, "mini", 72, 51, (57.2, 57.2), 36.5, 1),
    Measured(*_SMALL, "tiny", 10, 2.5, (41.0, 41.0), 32.9, 1),
    Measured(*_SMALL, "tiny-muon", 12, 2.7, (43.7, 44.0), 32.9, 3),
    Measured(*_SMALL, "tiny", 96, 18, (53.2, 53.2), 32.9, 1),
)


def nearest(count: int | None) -> list[Measured]:
    """Return the runs on the data set whose number of images is nearest by ratio, the shortest first.

    Args:
        count: Number of images. If None, it is unknown, and the most images are assumed.
    """
    sizes = {row.images for row in MEASURED}
    images = max(sizes) if count is None else min(sizes, key=lambda size: abs(math.log(size / max(1, count))))
    return sorted((row for row in MEASURED if row.images == images), key=lambda row: row.minutes)


def choose(count: int | None, minutes: float) -> Measured:
    """Return the longest run on about as many images that fits the time.

    Raises:
        DinoError: If every run takes longer.
    """
    rows = nearest(count)
    fitting = [row for row in rows if row.minutes <= minutes]
    if not fitting:
        raise DinoError(
            f"--minutes {minutes:g} is less than any measured run; expected {rows[0].minutes:g} or more",
            f"--minutes {rows[0].minutes:g}",
        )
    return fitting[-1]


def describe(count: int | None) -> str:
    """Return what runs on about as many images have reached, in one line."""
    rows = nearest(count)
    reached = ", ".join(map(_describe_row, rows))
    return f"measured on {rows[0].data}, k-NN in %: {rows[0].untrained:g} untrained, {reached}"


def _describe_row(row: Measured) -> str:
    low, high = row.knn
    knn = f"{low}" if low == high else f"{low} to {high}"
    runs = "one run" if row.seeds == 1 else f"{row.seeds} seeds"
    return f"{knn} by {row.preset} with --epochs {row.epochs} ({row.minutes:g} core minutes, {runs})"
