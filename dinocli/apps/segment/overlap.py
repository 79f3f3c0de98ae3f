"""Overlap between manual masks and foregrounds found without training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dinocli.apps.segment.edges import refine
from dinocli.apps.segment.foreground import KEEP, TAU, By, foreground
from dinocli.data.decode.pixels import BadImage
from dinocli.data.sources.masks import read_object
from dinocli.data.sources.photos import read_photo
from dinocli.evals.attention import jaccard
from dinocli.features.encoder import Encoder, NotFinite
from dinocli.viz.picture import visible

EVERYTHING, ELLIPSE = "all foreground", "centred ellipse"
_AXIS = 1 / 3  # semi-axis of the ellipse, as a share of the photo's side


@dataclass(frozen=True)
class Overlaps:
    """Overlap scores of photos.

    Attributes:
        each: Jaccard overlap with the mask by method, per photo path; trivial baselines come last.
        skipped: Photos without a score, with reasons.
    """

    each: dict[Path, dict[str, float]]
    skipped: dict[Path, str]

    @property
    def means(self) -> dict[str, float]:
        """Mean overlap per method over all photos."""
        ways = next(iter(self.each.values()), {})
        return {way: float(np.mean([scores[way] for scores in self.each.values()])) for way in ways}


def overlaps(
    encoder: Encoder,
    pairs: Mapping[Path, Path],
    ways: Sequence[By],
    *,
    short_side: int,
    keep: float = KEEP,
    tau: float = TAU,
    report: Callable[[int], None] = lambda done: None,
) -> Overlaps:
    """Measure foregrounds at pixel resolution, with two baselines: a full mask and a centered ellipse.

    Args:
        encoder: Frozen encoder.
        pairs: Photos and their masks.
        ways: Methods to find the foreground.
        short_side: Short side in pixels after resizing.
        keep: Share of the attention that a mask holds.
        tau: Cosine threshold of the cut.
        report: Callback after each photo, with the number done.
    """
    each, skipped = dict[Path, dict[str, float]](), dict[Path, str]()
    for done, (photo, mask) in enumerate(pairs.items(), 1):
        pixels, truth = read_photo(photo, encoder.images), read_object(mask)
        if isinstance(pixels, BadImage):
            skipped[photo] = pixels.reason
        elif isinstance(truth, BadImage):
            skipped[photo] = f"its mask: {truth.reason}"
        elif truth.shape != pixels.shape[:2]:
            skipped[photo] = f"it has {_format_size(pixels)} pixels, but its mask has {_format_size(truth)}"
        else:
            try:
                found = {by: foreground(encoder, pixels, short_side, by, keep=keep, tau=tau) for by in ways}
            except NotFinite as error:
                skipped[photo] = error.reason
            else:
                masks = {str(by): refine(result.mask, visible(pixels)) for by, result in found.items()}
                masks |= {EVERYTHING: np.ones_like(truth), ELLIPSE: ellipse(*truth.shape)}
                each[photo] = {way: jaccard(predicted, truth) for way, predicted in masks.items()}
        report(done)
    return Overlaps(each, skipped)


def ellipse(height: int, width: int) -> NDArray[np.bool_]:
    """Return a centered ellipse, two thirds as high and wide as the photo: 35 % of its area. [H, W]"""
    y, x = ((np.arange(side) + 0.5) / side - 0.5 for side in (height, width))
    return (y[:, None] / _AXIS) ** 2 + (x / _AXIS) ** 2 <= 1


def _format_size(values: NDArray[np.generic]) -> str:
    return f"{values.shape[1]}x{values.shape[0]}"
