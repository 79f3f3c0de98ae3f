"""Connected components of graphs and masks."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dinocli.core.tensors import Indices

Mask = NDArray[np.bool_]


class Pieces:
    """Connected components of S items, as a union-find structure."""

    def __init__(self, count: int) -> None:
        self._roots = np.arange(count)

    def join(self, first: Indices, second: Indices) -> None:
        """Join pairs of items. Both [P]."""
        while len(first):
            a, b = self._find(first), self._find(second)
            apart = a != b
            first, second, a, b = first[apart], second[apart], a[apart], b[apart]
            # Each root is attached to the smallest root it is paired with; overwritten pairs are joined next time.
            np.minimum.at(self._roots, np.maximum(a, b), np.minimum(a, b))

    def _find(self, rows: Indices) -> Indices:
        roots = self._roots[rows]
        while not np.array_equal(above := self._roots[roots], roots):
            roots = above
        self._roots[rows] = roots
        return roots

    def firsts(self) -> Indices:
        """Return the first member of each item's component. [S]"""
        return self._find(np.arange(len(self._roots)))

    def groups(self) -> list[Indices]:
        """Return components of two or more items, ordered by their first member; rows ascend."""
        firsts = self.firsts()
        order = np.argsort(firsts, kind="stable")
        cuts = np.flatnonzero(np.diff(firsts[order])) + 1
        return [group for group in np.split(order, cuts) if len(group) > 1]


def components(mask: Mask) -> NDArray[np.int64]:
    """Label the 4-connected components of a mask from 1; 0 is outside. [rows, columns]

    Rows are split into runs and touching runs are joined, without a loop over pixels.
    """
    rows, columns = mask.shape
    line = columns + 1  # each row ends with a gap, so that no run continues in the next row
    flat = np.zeros(rows * line + 1, dtype=np.int8)
    flat[:-1].reshape(rows, line)[:, :columns] = mask
    edges = np.diff(flat, prepend=0)
    starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    # First run of the next row that touches each run, and the number of runs that do.
    first = np.searchsorted(ends, starts + line, side="right")
    count = np.maximum(np.searchsorted(starts, ends + line, side="left") - first, 0)
    above = np.repeat(np.arange(len(starts)), count)
    below = np.arange(len(above)) - np.repeat(np.cumsum(count) - count, count) + np.repeat(first, count)
    runs = Pieces(len(starts))
    runs.join(above, below)
    labels = np.zeros((rows, columns), dtype=np.int64)
    labels[mask] = np.repeat(np.unique(runs.firsts(), return_inverse=True)[1] + 1, ends - starts)
    return labels


def largest_component(mask: Mask) -> Mask:
    """Return the largest component of a mask; ties go to the first. [rows, columns]"""
    numbers = components(mask)
    return mask & (numbers == np.bincount(numbers[mask]).argmax()) if mask.any() else mask


def component_at(mask: Mask, place: tuple[int, int]) -> Mask:
    """Return the component of a mask at a position, or an empty mask if it is False there. [rows, columns]"""
    numbers = components(mask)
    return mask & (numbers == numbers[place])
