"""DAVIS: how well masks of a video fit the true ones, by region (J) and by boundary (F)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dinocli.data.labels import LabelMap, Labels
from dinocli.evals.attention import jaccard

Mask = NDArray[np.bool_]
_TOLERANCE = 0.008  # of the image's diagonal


@dataclass(frozen=True)
class Score:
    """Means over the frames of an object, or over objects.

    Attributes:
        j: Region: overlap of the masks, 0 to 1.
        f: Boundary: F-measure of the outlines, 0 to 1.
    """

    j: float
    f: float

    @property
    def j_and_f(self) -> float:
        """The mean of both, by which DAVIS ranks."""
        return (self.j + self.f) / 2


@dataclass(frozen=True)
class VideoScore:
    """Scores of a video.

    Attributes:
        mean: Over its objects.
        objects: Each by its number.
        frames: How many were counted.
    """

    mean: Score
    objects: dict[int, Score]
    frames: int


def frame_scores(found: Labels, truth: LabelMap, objects: Sequence[int]) -> NDArray[np.float64]:
    """J and F of each object in a frame; what is void in the truth counts in neither mask. [objects, 2]

    Args:
        found: [H, W]
        truth: Of the same size.
        objects: Their values in both.

    Source: davisvideochallenge/davis2017-evaluation@30b698a davis2017/metrics.py (`void_pixels`).
    """
    known = ~truth.void
    masks = [((found == value) & known, (truth.values == value) & known) for value in objects]
    return np.array([(jaccard(mask, true), boundary_f(mask, true)) for mask, true in masks])


def video_score(frames: Sequence[NDArray[np.float64]], objects: Sequence[int]) -> VideoScore:
    """Means over the frames of a video, as `frame_scores` gave them; each object counts the same."""
    values = np.mean(frames, axis=0)  # [objects, 2]
    scores = {number: Score(*row) for number, row in zip(objects, values.tolist(), strict=True)}
    return VideoScore(Score(*values.mean(0).tolist()), scores, len(frames))


def boundary_f(mask: Mask, truth: Mask) -> float:
    """F-measure of two outlines: pixels of one that lie within 0.8 % of the image's diagonal, rounded up, of the other.

    Two masks without any outline agree; of one without, precision or recall is 0.

    Args:
        mask: [H, W]
        truth: [H, W]

    Source: Perazzi et al., CVPR 2016; davisvideochallenge/davis2017-evaluation@30b698a davis2017/metrics.py.
    """
    radius = math.ceil(_TOLERANCE * math.hypot(*mask.shape))
    ours, theirs = boundary(mask), boundary(truth)
    if not ours.any() or not theirs.any():
        return float(ours.any() == theirs.any())
    precision = (ours & widened(theirs, radius)).sum() / ours.sum()
    recall = (theirs & widened(ours, radius)).sum() / theirs.sum()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def boundary(mask: Mask) -> Mask:
    """Pixels that differ from the one to the right, below, or both, half a pixel up and left of the edge. [H, W]"""
    # Beyond the last row and column everything stays as it is.
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask ^ padded[:-1, 1:]) | (mask ^ padded[1:, :-1]) | (mask ^ padded[1:, 1:])


def widened(mask: Mask, radius: int) -> Mask:
    """All pixels whose centre lies no further than so many pixels from one of the mask's. [H, W]"""
    height, width = mask.shape
    result = np.zeros_like(mask)
    # How many of the mask's pixels lie within reach to the left and right is a difference of running sums.
    sums, columns = np.pad(np.cumsum(mask, 1, dtype=np.int32), ((0, 0), (1, 0))), np.arange(width)
    for dy in range(-min(radius, height - 1), min(radius, height - 1) + 1):
        reach = math.isqrt(radius**2 - dy**2)
        near = sums[:, np.minimum(columns + reach + 1, width)] > sums[:, np.maximum(columns - reach, 0)]
        result[max(0, dy) : height + min(0, dy)] |= near[max(0, -dy) : height - max(0, dy)]
    return result
