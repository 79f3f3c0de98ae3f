"""Curation: select training images from an unordered pool by feature similarity."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import faiss
import numpy as np

from dinocli.core.errors import DinoError
from dinocli.core.tensors import Indices, Values
from dinocli.evals.equal import found_in
from dinocli.evals.nearest import nearest
from dinocli.evals.units import Floats, unit

_QUERIES = 8192  # queries per search
_LEARN = 256  # training features per cluster
_LEARN_BYTES = 2**30  # largest memory of the training features
_ROUNDS = 20  # k-means iterations
HELD = 4  # smallest number of seeds in a selected cluster: the paper requires more than three

Report = Callable[[int], None]


def near_to(
    values: Values, rows: Indices, others: Values, threshold: float, report: Report = lambda done: None
) -> Indices:
    """Return the rows whose cosine to any of the other features is at least a threshold.

    Args:
        values: Features of the pool. [S, D]
        rows: Rows to test. [R]
        others: Features to compare with. [H, D]
        threshold: Smallest cosine that counts as near.
        report: Progress callback with the number of rows done.
    """
    near = found_in(values, rows, others)  # rounding may rank a copy second, behind a merely similar row
    for first in range(0, len(rows), _QUERIES):
        block = slice(first, first + _QUERIES)
        near[block] |= nearest(others, values[rows[block]], 1)[0][:, 0] >= threshold
        report(min(len(rows), first + _QUERIES))
    return rows[near]


def whole_groups(rows: Indices, members: Sequence[Indices]) -> Indices:
    """Return the given rows and all members of their groups, ascending.

    Args:
        rows: Rows to expand, such as those near held-out images. [R]
        members: Rows of each group of near-duplicates.

    Source: arXiv 2304.07193, appendix A.3, relative deduplication.
    """
    near = set(rows.tolist())
    touched = [group for group in members if not near.isdisjoint(group.tolist())]
    return np.unique(np.concatenate([rows, *touched]))


def retrieve(values: Values, rows: Indices, seeds: Values, k: int, report: Report = lambda done: None) -> Indices:
    """Return the rows that are among the k nearest of any seed, ascending.

    Args:
        values: Features of the pool. [S, D]
        rows: Candidate rows. [R]
        seeds: Features of the seed images. [Q, D]
        k: Images per seed.
        report: Progress callback with the number of seeds done.

    Source: arXiv 2304.07193, appendix A.4, sample-based.
    """
    is_found = np.zeros(len(values), bool)
    for first in range(0, len(seeds), _QUERIES):
        block = seeds[first : first + _QUERIES]
        is_found[nearest(values, block, min(k, len(rows)), among=rows)[1]] = True
        report(first + len(block))
    return np.flatnonzero(is_found)


def clusters(values: Values, rows: Indices, count: int, seed: int) -> Floats:
    """Compute the centers of spherical k-means over the given rows, with length 1. [count, D]

    Raises:
        DinoError: If there are fewer images than clusters.
    """
    if not 1 <= count <= len(rows):
        raise DinoError(
            f"--clusters {count} is not between 1 and {len(rows)}, the number of images left",
            f"use --clusters {max(1, len(rows) // 10)}",
        )
    width = values.shape[1]
    max_training = max(count, min(count * _LEARN, _LEARN_BYTES // (4 * width)))
    training = np.random.default_rng(seed).permutation(len(rows))[:max_training]
    options = {"min_points_per_centroid": 1, "max_points_per_centroid": len(rows)}
    means = faiss.Kmeans(width, count, niter=_ROUNDS, seed=seed, spherical=True, **options)
    means.train(unit(values[rows[np.sort(training)]]))
    return unit(np.asarray(means.centroids))


def assign(values: Values, rows: Indices, centers: Floats, report: Report = lambda done: None) -> Indices:
    """Return the number of the nearest center of each given row. [R]"""
    numbers = np.empty(len(rows), np.int64)
    for first in range(0, len(rows), _QUERIES):
        block = rows[first : first + _QUERIES]
        numbers[first : first + len(block)] = nearest(centers, values[block], 1)[1][:, 0]
        report(first + len(block))
    return numbers


def sample(rows: Indices, of: Indices, each: int, seed: int, among: Indices | None = None) -> Indices:
    """Draw the same number of rows from each cluster at random, or all rows of a smaller cluster.

    Args:
        rows: Rows to draw from. [R]
        of: Cluster of each row. [R]
        each: Rows per cluster.
        seed: Seed of the images drawn from each cluster.
        among: Clusters to draw from. If None, all.

    Source: arXiv 2304.07193, appendix A.4, cluster-based.
    """
    order = np.random.default_rng(seed).permutation(len(rows))
    order = order[np.argsort(of[order], kind="stable")]  # cluster after cluster, each in random order
    starts = np.flatnonzero(np.diff(of[order], prepend=-1))
    rank = np.arange(len(rows)) - np.repeat(starts, np.diff(starts, append=len(rows)))
    drawn = order[rank < each]
    if among is not None:
        drawn = drawn[np.isin(of[drawn], among)]
    return np.sort(rows[drawn])


def held(of_seeds: Indices, least: int = HELD) -> Indices:
    """Return the clusters that hold at least `least` seeds."""
    numbers, counts = np.unique(of_seeds, return_counts=True)
    return numbers[counts >= least]
