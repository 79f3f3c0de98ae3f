"""Deduplication: groups of near-duplicates by feature cosine, and the image of each group to keep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dinocli.core.tensors import Indices, Values
from dinocli.evals.components import Pieces
from dinocli.evals.equal import first_equal
from dinocli.evals.near_pairs import Projection, near_pairs
from dinocli.evals.nearest import alike, nearest
from dinocli.evals.units import Floats

# Up to this many images, all pairs are compared, which also measures the nearest neighbour of every image.
ALL_PAIRS_UP_TO = 50_000
_SAMPLE = 4000  # images whose nearest neighbours show the distribution of a larger set
_SHARE = 0.02  # of the pairs: if bounds leave more, comparing all is faster


@dataclass(frozen=True)
class Group:
    """Connected component of near-duplicate images.

    Attributes:
        kept: Row of the best image.
        dropped: Rows of the others.
        cosines: Cosine of each dropped image to its nearest neighbour in the group.
    """

    kept: int
    dropped: list[int]
    cosines: list[float]


@dataclass(frozen=True)
class Alike:
    """Near-duplicates of a gallery.

    Attributes:
        best: Cosine of each image to its nearest neighbour; NaN if it is below the threshold and was not measured. [S]
        pairs: Number of pairs at or above the threshold.
        members: Rows of each group, ascending.
    """

    best: Floats
    pairs: int
    members: list[Indices]


def find_alike(
    values: Values,
    threshold: float | None,
    report: Callable[[int], None] = lambda pairs: None,
    *,
    all_pairs: bool = False,
) -> Alike:
    """Join all pairs of images whose cosine is at least a threshold.

    Up to 50,000 images, all pairs are compared. In larger sets, bounds exclude nearly all pairs first; the result is
    the same up to rounding, but `best` lacks images without a near-duplicate. See `dinocli.evals.near_pairs`.

    Args:
        values: Features. [S, D]
        threshold: Smallest cosine of a near-duplicate pair. If None, only `best` is computed, of all images.
        report: Progress callback with the number of compared or excluded pairs, out of S * (S - 1) / 2.
        all_pairs: Compare all pairs of any number of images.
    """
    report(1)  # starts the estimate of the remaining time
    if threshold is not None and not all_pairs and len(values) > ALL_PAIRS_UP_TO:
        first = first_equal(values)
        distinct = np.unique(first)
        projection = Projection.learn(values)
        if len(distinct) < 2 or projection.share(values, threshold, distinct) <= _SHARE:
            return _find_by_bounds(values, threshold, projection, first, report)
    best = np.empty(len(values), np.float32)
    pieces, pairs = Pieces(len(values)), 0
    for tile in alike(values, threshold, best):
        pieces.join(tile.first, tile.second)
        pairs += len(tile.first)
        report(tile.done)
    return Alike(best, pairs, pieces.groups())


def _find_by_bounds(
    values: Values, threshold: float, projection: Projection, first: Indices, report: Callable[[int], None]
) -> Alike:
    """Find near-duplicates by `near_pairs`; `first` is the first image equal to each one. [S]"""
    copies = np.bincount(first, minlength=len(values))  # of each image, with itself
    pieces = Pieces(len(values))
    pieces.join(np.arange(len(values)), first)
    pairs = int((copies * (copies - 1) // 2).sum())
    best = np.where(copies > 1, np.float32(1), np.float32(np.nan))
    for tile in near_pairs(values, threshold, projection, np.flatnonzero(copies)):
        pieces.join(tile.first, tile.second)
        pairs += int((copies[tile.first] * copies[tile.second]).sum())
        for rows in (tile.first, tile.second):
            np.fmax.at(best, rows, tile.cosines)
        report(tile.done)
    report(len(values) * (len(values) - 1) // 2)
    return Alike(best[first], pairs, pieces.groups())


def sample_best(values: Values, report: Callable[[int], None] = lambda rows: None) -> Floats:
    """Return the cosine to the nearest neighbour of up to 4,000 random images. [min(S, 4000)]

    Args:
        values: Features of at least two images. [S, D]
        report: Progress callback with the number of images compared with.
    """
    rows = np.sort(np.random.default_rng(0).choice(len(values), min(len(values), _SAMPLE), replace=False))
    cosines, found = nearest(values, values[rows], 2, report=report)
    # An image is usually its own nearest neighbour, but an equal one may come first.
    return np.where(found[:, 0] == rows, cosines[:, 1], cosines[:, 0])


def choose(found: Alike, quality: Callable[[int], Sequence[int]]) -> list[Group]:
    """Choose the image of each group to keep: the one of highest quality, or the first of several.

    Args:
        found: Groups of near-duplicates.
        quality: Function from an image's row to its quality, such as pixels and then bytes.

    Returns:
        Groups in ascending order of their lowest cosine: the first is the most likely to be wrong.
    """
    groups = []
    for members in found.members:
        rows = members.tolist()
        kept = max(rows, key=lambda row: (*quality(row), -row))
        dropped = [row for row in rows if row != kept]
        # Each image's nearest neighbour is in its own group.
        groups.append(Group(kept, dropped, found.best[dropped].tolist()))
    return sorted(groups, key=lambda group: min(group.cosines))
