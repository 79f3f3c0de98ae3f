"""Equal rows of features, compared by value: cosines are too inexact to find them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinocli.core.tensors import Indices, Values
from dinocli.evals.units import unit

_BLOCK = 4096  # rows read at once
# Quantization steps per unit, for features of length 1. An image encoded in two batches differs by a relative 1e-7. In
# a few percent of such pairs, some number rounds to another step, and the pair is missed. Features that round to the
# same steps differ by at most 1e-3 in their cosine to any other feature.
_STEPS = 2**14

Read = Callable[[Indices], NDArray[Any]]


def first_equal(values: Values) -> Indices:
    """Return the first row equal to each row: the row itself unless it is a copy. [S, D] -> [S]"""
    return _find_first(_exact_reader(values), len(values))


def first_nearly_equal(values: Values) -> Indices:
    """Return the first row with the direction of each row, up to rounding; a few percent are missed. [S, D] -> [S]"""
    return _find_first(lambda rows: np.rint(unit(values[rows]) * np.float32(_STEPS)).astype(np.int16), len(values))


def found_in(values: Values, rows: Indices, others: Values) -> NDArray[np.bool_]:
    """Return a mask of the given rows that equal a row of other features. [R]"""
    theirs, their_row = np.unique(_hash_rows(_exact_reader(others), np.arange(len(others))), return_index=True)
    ours = _hash_rows(_exact_reader(values), rows)
    match = np.minimum(np.searchsorted(theirs, ours), len(theirs) - 1)
    is_equal = np.zeros(len(rows), bool)
    candidates = np.flatnonzero(theirs[match] == ours) if len(theirs) else match[:0]
    is_equal[candidates] = _compare_rows(
        _exact_reader(values), rows[candidates], _exact_reader(others), their_row[match[candidates]]
    )
    return is_equal


def _exact_reader(values: Values) -> Read:
    return lambda rows: values[rows] + np.float32(0)  # turns -0 into 0, so that equal numbers have equal bytes


def _find_first(read: Read, count: int) -> Indices:
    _, first, place = np.unique(_hash_rows(read, np.arange(count)), return_index=True, return_inverse=True)
    firsts = first[place].astype(np.int64)
    copies = np.flatnonzero(firsts != np.arange(count))
    differ = copies[~_compare_rows(read, copies, read, firsts[copies])]
    firsts[differ] = differ  # rows whose hashes collide
    return firsts


def _compare_rows(a: Read, rows: Indices, b: Read, others: Indices) -> NDArray[np.bool_]:
    parts = [(a(rows[block]) == b(others[block])).all(1) for block in _split_blocks(len(rows))]
    return np.concatenate(parts) if parts else np.zeros(0, bool)


def _hash_rows(read: Read, rows: Indices) -> NDArray[np.int64]:
    hashes = np.empty(len(rows), np.int64)
    for block in _split_blocks(len(rows)):
        values = np.ascontiguousarray(read(rows[block]))
        data, width = values.tobytes(), values.shape[1] * values.itemsize
        hashes[block] = [hash(data[i : i + width]) for i in range(0, len(data), width)]
    return hashes


def _split_blocks(count: int) -> Iterator[slice]:
    return (slice(first, first + _BLOCK) for first in range(0, count, _BLOCK))
