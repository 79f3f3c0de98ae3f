"""DAVIS: accuracy of video masks by region (J) and by boundary (F)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dinocli.data.sources.label_maps import LabelMap, Labels
from dinocli.evals.attention import jaccard

Mask = NDArray[np.bool_]
_TOLERANCE = 0.008  # of the image diagonal


@dataclass(frozen=True)
class Score:
    """Mean scores over the frames of an object, or over objects.

    Attributes:
        j: Region: Jaccard overlap of the masks, 0 to 1.
        f: Boundary: F-measure of the outlines, 0 to 1.
    """

    j: float
    f: float

    @property
    def j_and_f(self) -> float:
        """Mean of J and F, the measure that DAVIS ranks by."""
        return (self.j + self.f) / 2


@dataclass(frozen=True)
class VideoScore:
    """Scores of a video.

    Attributes:
        mean: Mean over its objects.
        objects: Score of each object, by its number.
        frames: Number of scored frames.
    """

    mean: Score
    objects: dict[int, Score]
    frames: int


def frame_scores(found: Labels, truth: LabelMap, objects: Sequence[int]) -> NDArray[np.float64]:
    """Compute J and F of each object in a frame; void pixels of the truth are outside both masks. [objects, 2]

    Args:
        found: Predicted labels. [H, W]
        truth: True labels of the same size.
        objects: Label values of the objects.

    Source: davisvideochallenge/davis2017-evaluation@30b698a davis2017/metrics.py (`void_pixels`).
    """
    known = ~truth.void
    masks = [((found == value) & known, (truth.values == value) & known) for value in objects]
    return np.array([(jaccard(mask, true), boundary_f(mask, true)) for mask, true in masks])


def video_score(frames: Sequence[NDArray[np.float64]], objects: Sequence[int]) -> VideoScore:
    """Average the `frame_scores` of a video; each object counts equally."""
    values = np.mean(frames, axis=0)  # [objects, 2]
    scores = {number: Score(*row) for number, row in zip(objects, values.tolist(), strict=True)}
    return VideoScore(Score(*values.mean(0).tolist()), scores, len(frames))


def boundary_f(mask: Mask, truth: Mask) -> float:
    """Compute the F-measure of two outlines.

    A pixel matches if the other outline is within 0.8 % of the image diagonal, rounded up. The result is 1 if neither
    mask has an outline, and 0 if only one has none.

    Args:
        mask: Predicted mask. [H, W]
        truth: True mask. [H, W]

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
    """Return the pixels that differ from their right, lower or lower-right neighbour. [H, W]"""
    # The last row and column are repeated: the frame's border is no boundary.
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask ^ padded[:-1, 1:]) | (mask ^ padded[1:, :-1]) | (mask ^ padded[1:, 1:])


def widened(mask: Mask, radius: int) -> Mask:
    """Return all pixels within `radius` pixels of the mask, from centre to centre. [H, W]"""
    height, width = mask.shape
    result = np.zeros_like(mask)
    # Differences of running sums count the mask's pixels within reach to the left and right.
    sums, columns = np.pad(np.cumsum(mask, 1, dtype=np.int32), ((0, 0), (1, 0))), np.arange(width)
    for dy in range(-min(radius, height - 1), min(radius, height - 1) + 1):
        reach = math.isqrt(radius**2 - dy**2)
        near = sums[:, np.minimum(columns + reach + 1, width)] > sums[:, np.maximum(columns - reach, 0)]
        result[max(0, dy) : height + min(0, dy)] |= near[max(0, -dy) : height - max(0, dy)]
    return result
