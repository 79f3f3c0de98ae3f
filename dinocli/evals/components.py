"""Components: the pieces of a mask that hang together."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]


def components(mask: Mask) -> NDArray[np.int64]:
    """The number of each place's piece, from 1; 0 outside. Places are neighbours by their sides. [rows, columns]

    Rows are taken as runs, and runs that touch get the least number of both until none changes: no loop over places.
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
    numbers = np.arange(len(starts))
    while (numbers[above] != numbers[below]).any():
        least = np.minimum(numbers[above], numbers[below])
        # Whole pieces move: what a run was told to be is told the same.
        np.minimum.at(numbers, numbers[above], least)
        np.minimum.at(numbers, numbers[below], least)
        numbers = _ends_of(numbers)
    named = np.zeros((rows, columns), dtype=np.int64)
    named[mask] = np.repeat(np.unique(numbers, return_inverse=True)[1] + 1, ends - starts)
    return named


def _ends_of(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where one arrives that goes from each number to its number, until it is its own."""
    while (numbers != numbers[numbers]).any():
        numbers = numbers[numbers]
    return numbers


def largest_component(mask: Mask) -> Mask:
    """The largest piece of a mask, the first of several. [rows, columns]"""
    numbers = components(mask)
    return mask & (numbers == np.bincount(numbers[mask]).argmax()) if mask.any() else mask


def component_at(mask: Mask, place: tuple[int, int]) -> Mask:
    """The piece of a mask that holds a place; nothing where the mask does not. [rows, columns]"""
    numbers = components(mask)
    return mask & (numbers == numbers[place])
