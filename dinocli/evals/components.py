"""Components: what hangs together, of things by the pairs that are told, and of a mask by its places' sides."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dinocli.mapped import Indices

Mask = NDArray[np.bool_]


class Pieces:
    """Which of S things hang together by the pairs that were told so far."""

    def __init__(self, count: int) -> None:
        self._roots = np.arange(count)

    def join(self, first: Indices, second: Indices) -> None:
        """Take pairs. Both [P]."""
        while len(first):
            a, b = self._find(first), self._find(second)
            apart = a != b
            first, second, a, b = first[apart], second[apart], a[apart], b[apart]
            # Each root hangs below the smallest one it meets; whoever lost against another comes again.
            np.minimum.at(self._roots, np.maximum(a, b), np.minimum(a, b))

    def _find(self, rows: Indices) -> Indices:
        roots = self._roots[rows]
        while not np.array_equal(above := self._roots[roots], roots):
            roots = above
        self._roots[rows] = roots
        return roots

    def firsts(self) -> Indices:
        """The first member of each thing's piece. [S]"""
        return self._find(np.arange(len(self._roots)))

    def groups(self) -> list[Indices]:
        """Those of more than one, by their first member; rows ascending."""
        firsts = self.firsts()
        order = np.argsort(firsts, kind="stable")
        cuts = np.flatnonzero(np.diff(firsts[order])) + 1
        return [group for group in np.split(order, cuts) if len(group) > 1]


def components(mask: Mask) -> NDArray[np.int64]:
    """The number of each place's piece, from 1; 0 outside. Places are neighbours by their sides. [rows, columns]

    Rows are taken as runs, of which those that touch are joined: no loop over places.
    """
    rows, columns = mask.shape
    line = columns + 1  # with a gap at the end of each row
    flat = np.zeros(rows * line + 1, dtype=np.int8)
    flat[:-1].reshape(rows, line)[:, :columns] = mask
    edges = np.diff(flat, prepend=0)
    starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    # The runs in the next row that touch one, from `first` on.
    first = np.searchsorted(ends, starts + line, side="right")
    count = np.maximum(np.searchsorted(starts, ends + line, side="left") - first, 0)
    above = np.repeat(np.arange(len(starts)), count)
    below = np.arange(len(above)) - np.repeat(np.cumsum(count) - count, count) + np.repeat(first, count)
    runs = Pieces(len(starts))
    runs.join(above, below)
    named = np.zeros((rows, columns), dtype=np.int64)
    named[mask] = np.repeat(np.unique(runs.firsts(), return_inverse=True)[1] + 1, ends - starts)
    return named


def largest_component(mask: Mask) -> Mask:
    """The largest piece of a mask, the first of several. [rows, columns]"""
    numbers = components(mask)
    return mask & (numbers == np.bincount(numbers[mask]).argmax()) if mask.any() else mask


def component_at(mask: Mask, place: tuple[int, int]) -> Mask:
    """The piece of a mask that holds a place; nothing where the mask does not. [rows, columns]"""
    numbers = components(mask)
    return mask & (numbers == numbers[place])
