"""Deduplication: groups of near-duplicates by feature cosine, and the image of each group to keep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dinocli.core.tensors import Indices, Values
from dinocli.evals.components import Pieces
from dinocli.evals.nearest import alike
from dinocli.evals.units import Floats


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
        best: Cosine of each image to its nearest neighbour. [S]
        pairs: Number of pairs at or above the threshold.
        members: Rows of each group, ascending.
    """

    best: Floats
    pairs: int
    members: list[Indices]


def find_alike(values: Values, threshold: float | None, report: Callable[[int], None] = lambda pairs: None) -> Alike:
    """Compare all pairs of images, and join those whose cosine is at least a threshold.

    The comparison is exact and holds at most two blocks of features in memory. Its cost grows with the square of S.

    Args:
        values: Features. [S, D]
        threshold: Smallest cosine of a near-duplicate pair. If None, only `best` is computed.
        report: Progress callback with the number of compared pairs, out of S * (S - 1) / 2.
    """
    best = np.empty(len(values), np.float32)
    pieces, pairs = Pieces(len(values)), 0
    report(1)  # starts the estimate of the remaining time
    for tile in alike(values, threshold, best):
        pieces.join(tile.first, tile.second)
        pairs += len(tile.first)
        report(tile.done)
    return Alike(best, pairs, pieces.groups())


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
