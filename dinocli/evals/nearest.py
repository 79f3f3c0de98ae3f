"""Nearest neighbours: exact blockwise search by cosine, over features in memory or on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dinocli.core.device import multiplies_bfloat16_fast
from dinocli.core.tensors import Indices, Values
from dinocli.evals.equal import first_equal
from dinocli.evals.largest import LargestCosines
from dinocli.evals.units import Floats, unit

_BLOCK_BYTES = 32 * 2**20  # of float32 features searched at once
_ROWS_PER_NEIGHBOUR = (
    256  # least rows of a block, times k: each block collects k neighbours anew, and merging costs time
)
_TILE = 4096  # side of a square of cosines computed at once: 64 MB
_CLOSE = 1e-5  # rows this close to a cosine of 1 may be equal: rounding errors are smaller


def nearest(
    values: Values,
    queries: Floats,
    k: int,
    *,
    among: Indices | None = None,
    report: Callable[[int], None] = lambda rows: None,
) -> tuple[Floats, NDArray[np.int64]]:
    """Return the cosines and rows of each query's k nearest features, the nearest first. [Q, k] each

    The search is exact: it reads the features in blocks and keeps the nearest so far. Rows equal to the query
    have a cosine of exactly 1, and no cosine is larger.

    Args:
        values: Features to search. [S, D]
        queries: Features to search for. [Q, D]
        k: Number of neighbours, at most the number of candidates.
        among: Candidate rows. If None, all.
        report: Callback after each block, with the number of rows done.
    """
    originals, queries = queries, unit(queries)
    count = len(values) if among is None else len(among)
    step = max(1, _BLOCK_BYTES // (4 * queries.shape[1]), _ROWS_PER_NEIGHBOUR * k)
    largest = LargestCosines(queries, k, rounded=multiplies_bfloat16_fast())
    for first in range(0, count, step):
        last = min(count, first + step)
        numbers = np.arange(first, last) if among is None else among[first:last]
        largest.add(unit(values[first:last] if among is None else values[numbers]), numbers)
        report(last)
    return bounded(values, originals, largest.cosines, largest.rows)


def bounded(values: Values, queries: Floats, cosines: Floats, rows: Indices) -> tuple[Floats, Indices]:
    """Undo rounding in cosines: rows equal to the query get 1, and all values are clipped to [-1, 1].

    Neighbours with equal cosines are put in the order of their rows.

    Args:
        values: Features that were searched. [S, D]
        queries: Features that were searched for. [Q, D]
        cosines: Cosine of each neighbour, in descending order; changed in place. [Q, K]
        rows: Row of each neighbour, -1 if none was found; changed in place. [Q, K]
    """
    q, place = np.nonzero(cosines > 1 - _CLOSE)
    step = max(1, _BLOCK_BYTES // (4 * queries.shape[1]))
    for first in range(0, len(q), step):
        block = slice(first, first + step)
        same = (values[rows[q[block], place[block]]] == queries[q[block]]).all(1)
        cosines[q[block][same], place[block][same]] = 1
    np.clip(cosines, -1, 1, out=cosines, where=rows >= 0)
    tied = np.flatnonzero((cosines[:, 1:] == cosines[:, :-1]).any(1))
    changed = np.union1d(q, tied)
    order = np.lexsort((rows[changed], -cosines[changed]))
    cosines[changed] = np.take_along_axis(cosines[changed], order, 1)
    rows[changed] = np.take_along_axis(rows[changed], order, 1)
    return cosines, rows


class Tile(NamedTuple):
    """Similar pairs in one square of the cosine matrix.

    Attributes:
        done: Number of pairs compared so far, out of S * (S - 1) / 2.
        first: First row of each similar pair, smaller than `second`. [P]
        second: Second row of each pair. [P]
        cosines: Cosine of each pair. [P]
    """

    done: int
    first: Indices
    second: Indices
    cosines: Floats


def alike(values: Values, threshold: float | None, best: Floats) -> Iterator[Tile]:
    """Yield all pairs of features with a cosine of at least a threshold, tile by tile; equal features have 1.

    Args:
        values: Features to compare. [S, D]
        threshold: Smallest cosine of a similar pair. If None, no pair qualifies.
        best: Output array for each feature's cosine to its nearest neighbour; valid after the last tile. [S]

    Yields:
        Similar pairs in one square of the cosine matrix; each pair appears once.
    """
    best[:] = -1
    count, done = len(values), 0
    group = first_equal(values)
    has_copy = np.bincount(group, minlength=count)[group] > 1
    for top in range(0, count, _TILE):
        rows = unit(values[top : top + _TILE])
        for left in range(top, count, _TILE):
            columns = rows if left == top else unit(values[left : left + _TILE])
            cosines = rows @ columns.T
            a, b = (np.flatnonzero(has_copy[i : i + _TILE]) for i in (top, left))
            if len(a) and len(b):
                same = group[top + a, None] == group[left + b]
                cosines[np.ix_(a, b)] = np.where(same, np.float32(1), cosines[np.ix_(a, b)])
            if left == top:
                cosines[np.tril_indices(len(rows))] = -2  # each pair once, without self-pairs
            for i, axis, size in ((top, 1, len(rows)), (left, 0, len(columns))):
                best[i : i + size] = np.maximum(best[i : i + size], np.minimum(cosines.max(axis), 1))
            first, second = np.nonzero(cosines >= (2 if threshold is None else threshold))
            done += len(rows) * (len(rows) - 1) // 2 if left == top else cosines.size
            yield Tile(done, first + top, second + left, np.minimum(cosines[first, second], 1))
