"""Nearest: exact neighbours by cosine, of features in memory or on the disk, a block at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import faiss
import numpy as np
from numpy.typing import NDArray

from dinocli.evals.equal import first_equal
from dinocli.evals.units import Floats, unit
from dinocli.mapped import Indices, Values

_BLOCK_BYTES = 8 * 2**20  # of float32 features that are searched at once; what stays in the processor is twice as fast
_TILE = 4096  # images a side of the square of cosines that is looked at at once: 64 MB
_CLOSE = 1e-5  # below a cosine of 1, within which rows may be equal: rounding takes away less


def nearest(
    values: Values,
    queries: Floats,
    k: int,
    *,
    among: Indices | None = None,
    report: Callable[[int], None] = lambda rows: None,
) -> tuple[Floats, NDArray[np.int64]]:
    """Cosines and rows of each query's k nearest features, the nearest first. [Q, k] each

    The search is exact. The features are taken in blocks, of which the nearest so far are kept. Rows that are equal to
    the query have a cosine of exactly 1, and no cosine is larger.

    Args:
        values: Of which some are to be found. [S, D]
        queries: [Q, D]
        k: How many, at most as many as there are.
        among: Rows that may be found; absent, all.
        report: Called after each block with the number of rows done so far.
    """
    asked, queries = queries, unit(queries)
    count = len(values) if among is None else len(among)
    step = max(1, _BLOCK_BYTES // (4 * queries.shape[1]))
    heap = faiss.ResultHeap(len(queries), k, keep_max=True)
    for first in range(0, count, step):
        rows = slice(first, first + step)
        block = unit(values[rows] if among is None else values[among[rows]])
        cosines, found = faiss.knn(queries, block, min(k, len(block)), metric=faiss.METRIC_INNER_PRODUCT)
        if among is not None:
            found, first = among[rows][found], 0
        report(min(count, rows.stop))
        if len(block) == count:
            return bounded(values, asked, cosines, found)
        heap.add_result(cosines, found + first)
    heap.finalize()
    return bounded(values, asked, heap.D, heap.I)


def bounded(values: Values, queries: Floats, cosines: Floats, rows: Indices) -> tuple[Floats, Indices]:
    """Undo what rounding does to cosines: those of rows that are equal to the query are 1, and none is beyond 1 or -1.

    Args:
        values: [S, D]
        queries: [Q, D]
        cosines: Cosine of each neighbour, the nearest first; changed in place. [Q, K]
        rows: Row of each neighbour, -1 if none was found; changed in place. [Q, K]
    """
    q, place = np.nonzero(cosines > 1 - _CLOSE)
    step = max(1, _BLOCK_BYTES // (4 * queries.shape[1]))
    for first in range(0, len(q), step):
        some = slice(first, first + step)
        same = (values[rows[q[some], place[some]]] == queries[q[some]]).all(1)
        cosines[q[some][same], place[some][same]] = 1
    np.clip(cosines, -1, 1, out=cosines, where=rows >= 0)
    again = np.unique(q)
    order = np.argsort(-cosines[again], axis=1, kind="stable")
    cosines[again] = np.take_along_axis(cosines[again], order, 1)
    rows[again] = np.take_along_axis(rows[again], order, 1)
    return cosines, rows


class Tile(NamedTuple):
    """A part of all pairs.

    Attributes:
        done: Pairs looked at so far, of S * (S - 1) / 2.
        first: Rows of the alike pairs in this part, below `second`. [P]
        second: [P]
        cosines: [P]
    """

    done: int
    first: Indices
    second: Indices
    cosines: Floats


def alike(values: Values, threshold: float | None, best: Floats) -> Iterator[Tile]:
    """All pairs of features whose cosine is at least a threshold, a part after another; of equal features it is 1.

    Args:
        values: [S, D]
        threshold: Of the cosine; absent, no pair is.
        best: Takes the cosine of each feature's nearest other one, which is right when all parts were taken. [S]

    Yields:
        What is alike in one square of the cosines; each pair comes once.
    """
    best[:] = -1
    count, done = len(values), 0
    group = first_equal(values)
    copied = np.bincount(group, minlength=count)[group] > 1
    for top in range(0, count, _TILE):
        rows = unit(values[top : top + _TILE])
        for left in range(top, count, _TILE):
            columns = rows if left == top else unit(values[left : left + _TILE])
            cosines = rows @ columns.T
            a, b = (np.flatnonzero(copied[i : i + _TILE]) for i in (top, left))
            if len(a) and len(b):
                same = group[top + a, None] == group[left + b]
                cosines[np.ix_(a, b)] = np.where(same, np.float32(1), cosines[np.ix_(a, b)])
            if left == top:
                cosines[np.tril_indices(len(rows))] = -2  # each pair once, and none with itself
            for i, axis, size in ((top, 1, len(rows)), (left, 0, len(columns))):
                best[i : i + size] = np.maximum(best[i : i + size], np.minimum(cosines.max(axis), 1))
            first, second = np.nonzero(cosines >= (2 if threshold is None else threshold))
            done += len(rows) * (len(rows) - 1) // 2 if left == top else cosines.size
            yield Tile(done, first + top, second + left, np.minimum(cosines[first, second], 1))
