"""Dedup: groups of near-duplicates, told by the cosine of their features, and which image of each to keep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dinocli.evals.components import Pieces
from dinocli.evals.nearest import alike
from dinocli.evals.units import Floats
from dinocli.mapped import Indices, Values


@dataclass(frozen=True)
class Group:
    """Images that hang together by pairs of near-duplicates.

    Attributes:
        kept: Row of the best one.
        dropped: Rows of the others.
        cosines: Of each of the others to the most alike image of the group.
    """

    kept: int
    dropped: list[int]
    cosines: list[float]


@dataclass(frozen=True)
class Alike:
    """What is alike in a gallery.

    Attributes:
        best: Cosine of each image to its nearest other one. [S]
        pairs: How many pairs are at the threshold or above it.
        members: Rows of each group, ascending.
    """

    best: Floats
    pairs: int
    members: list[Indices]


def find_alike(values: Values, threshold: float | None, report: Callable[[int], None] = lambda pairs: None) -> Alike:
    """Compare all images with all, and join those whose cosine is at least a threshold.

    Exact, and of the features no more than two blocks are in memory. The work grows with the square of their number.

    Args:
        values: [S, D]
        threshold: Of the cosine; absent, nothing is joined, and there is `best` alone.
        report: Called now and then with the number of pairs looked at, of S * (S - 1) / 2.
    """
    best = np.empty(len(values), np.float32)
    pieces, pairs = Pieces(len(values)), 0
    report(1)  # whoever tells the time that is left begins to count here
    for tile in alike(values, threshold, best):
        pieces.join(tile.first, tile.second)
        pairs += len(tile.first)
        report(tile.done)
    return Alike(best, pairs, pieces.groups())


def choose(found: Alike, quality: Callable[[int], Sequence[int]]) -> list[Group]:
    """Which image of each group to keep: the one of the highest quality, of equal ones the first.

    Args:
        found: The groups.
        quality: Of an image by its row, such as pixels and then bytes.

    Returns:
        The groups, the one with the lowest cosine first: it is the one most likely to be wrong.
    """
    groups = []
    for members in found.members:
        rows = members.tolist()
        kept = max(rows, key=lambda row: (*quality(row), -row))
        dropped = [row for row in rows if row != kept]
        # In a group each image's nearest other one is a member of it.
        groups.append(Group(kept, dropped, found.best[dropped].tolist()))
    return sorted(groups, key=lambda group: min(group.cosines))
