"""Equal rows: exact comparison of features, independent of rounding in their cosines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinocli.core.tensors import Indices, Values
from dinocli.evals.units import unit

_BLOCK = 4096  # rows read at once
# Steps per unit, for features of length 1. An image encoded in two batches differs by a relative 1e-7. One number of 30
# then falls on two sides of a step in a few percent of pairs. Cosines within a step differ by at most 1e-3.
_STEPS = 2**14

Read = Callable[[Indices], NDArray[Any]]


def first_equal(values: Values) -> Indices:
    """Return for each row the first row with the same numbers: the row itself unless it is a copy. [S, D] -> [S]"""
    return _first(_exactly(values), len(values))


def first_nearly_equal(values: Values) -> Indices:
    """Return for each row the first row of its direction, up to rounding, in nearly all cases. [S, D] -> [S]"""
    return _first(lambda rows: np.rint(unit(values[rows]) * np.float32(_STEPS)).astype(np.int16), len(values))


def found_in(values: Values, rows: Indices, others: Values) -> NDArray[np.bool_]:
    """Return a mask of the rows that have an equal row in other features. [R]"""
    theirs, place = np.unique(_hashes(_exactly(others), np.arange(len(others))), return_index=True)
    ours = _hashes(_exactly(values), rows)
    at = np.minimum(np.searchsorted(theirs, ours), len(theirs) - 1)
    there = np.zeros(len(rows), bool)
    candidates = np.flatnonzero(theirs[at] == ours) if len(theirs) else at[:0]
    there[candidates] = _are_equal(_exactly(values), rows[candidates], _exactly(others), place[at[candidates]])
    return there


def _exactly(values: Values) -> Read:
    return lambda rows: values[rows] + np.float32(0)  # turns -0 into 0, so that equal numbers have equal bytes


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
