"""Pairs of similar features among millions: exact, without comparing all pairs.

Unit vectors with a cosine of at least t have a distance of at most sqrt(2 - 2 t). Two bounds exclude nearly all others:

* A projection onto orthonormal directions does not lengthen a distance. Neither does the length of the remainder as
  one more coordinate. A product over 32 numbers thus replaces one over all dimensions.
* The projected features are divided into cells around centers. Two features of two cells are at least as far from
  each other as the sum of their distances to the plane halfway between the two centers.

The cosines of the remaining pairs are computed in full, so no pair is missed.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import faiss
import numpy as np

from dinocli.core.tensors import Indices, Values
from dinocli.evals.nearest import Tile
from dinocli.evals.units import Floats, unit

_DIRECTIONS = 29  # with the remainder, the square and a one: 32 columns
_SAMPLE = 20_000  # features whose principal directions are used
_READ = 8192  # features projected at once
_PER_CENTER = 40  # features that place a center
_ROUNDS = 6  # of k-means; better centers exclude hardly more
_SIDE = 1024  # of a block of products: 4 MB
_PENDING = 2**20  # pairs that wait for their cosine
_DENSE = 16  # a product of all rows takes this many times less per pair than products of single pairs
# Largest rounding error of squares and products of features of at most length 2, from 32 float32 additions each.
_ROUNDING = 2e-5


class _Cells(NamedTuple):
    """Projected features in the order of their cells.

    Attributes:
        rows: Row of each feature. [S]
        points: Projected features, then minus half their square, then 1. [S, P+2]
        levels: Product of each feature with its center, minus half the center's square. [S]
        begins: First feature of each cell, then S. [C+1]
        centers: Minus each center, then 0, then half its square. [C, P+2]
    """

    rows: Indices
    points: Floats
    levels: Floats
    begins: Indices
    centers: Floats


class Projection(NamedTuple):
    """Projection of features of length 1 that keeps a lower bound on their distances.

    Attributes:
        mean: Mean of the features. [D]
        directions: Orthonormal directions of largest variance. [D, P-1]
    """

    mean: Floats
    directions: Floats

    @classmethod
    def learn(cls, values: Values) -> Projection:
        """Learn from a random sample of features [S, D]."""
        sample = unit(values[_draw(len(values), _SAMPLE)])
        mean = sample.mean(0)
        sample -= mean
        return cls(mean, np.linalg.eigh(sample.T @ sample)[1][:, : -_DIRECTIONS - 1 : -1])

    def __call__(self, values: Values, rows: Indices) -> Floats:
        """Return the projected features of some rows, with the length of the remainder last. [R, P]"""
        points = np.empty((len(rows), self.directions.shape[1] + 1), np.float32)
        for first in range(0, len(rows), _READ):
            block = slice(first, first + _READ)
            features = unit(values[rows[block]]) - self.mean
            points[block, :-1] = projected = features @ self.directions
            points[block, -1] = np.linalg.norm(features - projected @ self.directions.T, axis=1)
        return points

    def share(self, values: Values, threshold: float, rows: Indices) -> float:
        """Estimate the share of pairs that the projection leaves at a threshold, from a sample of at least two rows."""
        points = self(values, rows[_draw(len(rows), _SIDE)])
        squares = np.einsum("sp,sp->s", points, points)
        distances = squares[:, None] + squares - 2 * points @ points.T
        pairs = np.triu(distances <= _reach(threshold), 1)
        return float(pairs.sum() / (len(points) * (len(points) - 1) / 2))


def near_pairs(values: Values, threshold: float, projection: Projection, rows: Indices) -> Iterator[Tile]:
    """Yield all pairs of features with a cosine of at least a threshold, up to rounding; each pair appears once.

    Holds about 280 bytes per feature, whatever its dimension. A pair that the bounds leave takes as long as a hundred
    products of all pairs, so this pays only if `Projection.share` is below a few percent.

    Args:
        values: Features. [S, D]
        threshold: Smallest cosine of a similar pair.
        projection: Projection learned from these features.
        rows: Rows to compare, without equal features, whose pairs are known. [R]

    Yields:
        Similar pairs of one cell and all later ones. `done` counts the pairs that were compared or excluded.
    """
    reach = _reach(threshold)
    cells = _divide(projection(values, rows), rows)
    done = 0
    for cell, (begin, end) in enumerate(pairwise(cells.begins.tolist())):
        waiting, count = [np.empty((0, 2), np.int64)], 0
        for pairs in _compare(cells, cell, reach):
            waiting.append(pairs)
            count += len(pairs)
            if count > _PENDING:
                yield _verify(values, threshold, cells.rows[np.concatenate(waiting)], done)
                waiting, count = waiting[:1], 0
        done += (end - begin) * (end - begin - 1) // 2 + (end - begin) * (len(rows) - end)
        yield _verify(values, threshold, cells.rows[np.concatenate(waiting)], done)


def _reach(threshold: float) -> float:
    """Return the largest squared distance of two unit vectors with a cosine of at least a threshold."""
    return max(0.0, 2 - 2 * threshold) + _ROUNDING


def _draw(count: int, most: int) -> Indices:
    return np.sort(np.random.default_rng(0).choice(count, min(count, most), replace=False))


def _divide(points: Floats, rows: Indices) -> _Cells:
    count = max(1, min(int(len(points) ** 0.5), len(points) // _PER_CENTER))
    means = faiss.Kmeans(
        points.shape[1], count, niter=_ROUNDS, min_points_per_centroid=1, max_points_per_centroid=_PER_CENTER
    )
    means.train(points)
    centers: Floats = np.asarray(means.centroids, np.float32)
    cell = np.empty(len(points), np.int64)
    for first in range(0, len(points), _READ):
        block = slice(first, first + _READ)
        cell[block] = means.index.search(points[block], 1)[1][:, 0]
    order = np.argsort(cell, kind="stable")
    points, cell = points[order], cell[order]
    squares, levels = (np.einsum("sp,sp->s", points, other) for other in (points, centers[cell]))
    half = np.einsum("cp,cp->c", centers, centers)[:, None] / 2
    return _Cells(
        rows[order],
        np.hstack([points, squares[:, None] / -2, np.ones_like(squares)[:, None]]),
        levels - half[cell, 0],
        np.searchsorted(cell, np.arange(count + 1)),
        np.hstack([-centers, np.zeros_like(half), half]),
    )


def _compare(cells: _Cells, cell: int, reach: float) -> Iterator[Indices]:
    """Yield the pairs of a cell's features, and of them with later ones, that the bounds leave, by position. [N, 2]

    Args:
        cells: Cells of all features.
        cell: Number of the cell.
        reach: Largest squared distance of a pair.
    """
    _, points, levels, begins, centers = cells
    begin, end = begins[cell : cell + 2]
    own = points[begin:end]
    swapped = own[:, [*range(own.shape[1] - 2), -1, -2]]  # so that a product is minus half the squared distance
    for pairs in _multiply(swapped, own, reach):
        yield begin + pairs[pairs[:, 0] < pairs[:, 1]]
    later = cell + 1 + np.flatnonzero(np.diff(begins[cell + 1 :]))
    if begin == end or not len(later):
        return
    # Distances to the plane halfway to the other center, times the distance of the two centers.
    ours = own @ centers[later].T + levels[begin:end, None]  # [own, later]
    theirs = points[end:] @ centers[cell] + levels[end:]
    least_of_theirs = np.minimum.reduceat(theirs, begins[later] - end)
    most = np.sqrt(reach) * np.linalg.norm(centers[later, :-2] - centers[cell, :-2], axis=1) + _ROUNDING
    near = ours <= most - least_of_theirs
    nearest = end + np.flatnonzero(theirs <= np.repeat(most - ours.min(0), np.diff(begins[[*later, -1]])))
    edges = np.searchsorted(nearest, begins[[*later, -1]])
    for i in np.flatnonzero(np.diff(edges)):
        x, y = np.flatnonzero(near[:, i]), nearest[edges[i] : edges[i + 1]]
        for pairs in _multiply(swapped[x], points[y], reach):
            yield np.column_stack([begin + x[pairs[:, 0]], y[pairs[:, 1]]])


def _multiply(x: Floats, y: Floats, reach: float) -> Iterator[Indices]:
    """Yield the pairs of points whose squared distance is at most `reach`, by position. [N, 2]"""
    for top in range(0, len(x), _SIDE):
        for left in range(0, len(y), _SIDE):
            products = x[top : top + _SIDE] @ y[left : left + _SIDE].T
            if products.max() >= reach / -2:
                yield np.argwhere(products >= reach / -2) + np.array([top, left])


def _verify(values: Values, threshold: float, pairs: Indices, done: int) -> Tile:
    """Return the pairs whose cosine is at least the threshold. [N, 2]"""
    (first, a), (second, b) = (np.unique(pairs[:, side], return_inverse=True) for side in (0, 1))
    cosines = np.empty(len(pairs), np.float32)
    x, y = unit(values[first]), unit(values[second])
    if len(pairs) * _DENSE > len(first) * len(second):
        cosines = (x @ y.T)[a, b]
    else:
        for start in range(0, len(pairs), _READ):
            block = slice(start, start + _READ)
            cosines[block] = np.einsum("nd,nd->n", x[a[block]], y[b[block]])
    near = cosines >= threshold
    return Tile(done, pairs[near].min(1), pairs[near].max(1), np.minimum(cosines[near], 1))
