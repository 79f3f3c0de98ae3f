"""Equal rows: features that are the same number by number, whatever rounding does to their cosine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinocli.evals.units import unit
from dinocli.mapped import Indices, Values

_BLOCK = 4096  # rows that are read at once
# Of a number of a feature of length 1. An image that is encoded in two batches differs by 1e-7 of its size, so that one
# number of 30 falls on two sides of a step in a few percent of pairs; cosines within a step differ by 1e-3 at most.
_STEPS = 2**14

Read = Callable[[Indices], NDArray[Any]]


def first_equal(values: Values) -> Indices:
    """Return for each row the first one with the same numbers: itself, unless it is a copy. [S, D] -> [S]"""
    return _first(_exactly(values), len(values))


def first_nearly_equal(values: Values) -> Indices:
    """Return for each row the first one of its direction, but for rounding, in nearly all cases. [S, D] -> [S]"""
    return _first(lambda rows: np.rint(unit(values[rows]) * np.float32(_STEPS)).astype(np.int16), len(values))


def found_in(values: Values, rows: Indices, others: Values) -> NDArray[np.bool_]:
    """Return which of some rows have an equal row in other features. [R]"""
    theirs, place = np.unique(_hashes(_exactly(others), np.arange(len(others))), return_index=True)
    ours = _hashes(_exactly(values), rows)
    at = np.minimum(np.searchsorted(theirs, ours), len(theirs) - 1)
    there = np.zeros(len(rows), bool)
    candidates = np.flatnonzero(theirs[at] == ours) if len(theirs) else at[:0]
    there[candidates] = _are_equal(_exactly(values), rows[candidates], _exactly(others), place[at[candidates]])
    return there


def _exactly(values: Values) -> Read:
    return lambda rows: values[rows] + np.float32(0)  # -0 becomes 0, which it equals


def _first(read: Read, count: int) -> Indices:
    _, first, place = np.unique(_hashes(read, np.arange(count)), return_index=True, return_inverse=True)
    found = first[place].astype(np.int64)
    copies = np.flatnonzero(found != np.arange(count))
    differ = copies[~_are_equal(read, copies, read, found[copies])]
    found[differ] = differ  # rows whose hashes collide
    return found


def _are_equal(a: Read, rows: Indices, b: Read, others: Indices) -> NDArray[np.bool_]:
    parts = [(a(rows[some]) == b(others[some])).all(1) for some in _blocks(len(rows))]
    return np.concatenate(parts) if parts else np.zeros(0, bool)


def _hashes(read: Read, rows: Indices) -> NDArray[np.int64]:
    found = np.empty(len(rows), np.int64)
    for some in _blocks(len(rows)):
        block = np.ascontiguousarray(read(rows[some]))
        data, width = block.tobytes(), block.shape[1] * block.itemsize
        found[some] = [hash(data[i : i + width]) for i in range(0, len(data), width)]
    return found


def _blocks(count: int) -> Iterator[slice]:
    return (slice(first, first + _BLOCK) for first in range(0, count, _BLOCK))
