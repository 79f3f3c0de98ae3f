"""Curation: from a pool without order the images that are worth training on, by what they are like."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import faiss
import numpy as np

from dinocli.errors import DinoError
from dinocli.evals.equal import found_in
from dinocli.evals.nearest import nearest
from dinocli.evals.units import Floats, unit
from dinocli.mapped import Indices, Values

_QUERIES = 8192  # that are searched at once
_LEARN = 256  # images for each cluster to learn from
_LEARN_BYTES = 2**30  # of them, at most
_ROUNDS = 20  # of k-means
HELD = 4  # seeds by which a cluster counts: the paper asks for more than three

Report = Callable[[int], None]


def near_to(
    values: Values, rows: Indices, others: Values, threshold: float, report: Report = lambda done: None
) -> Indices:
    """Those of some rows whose cosine to any of other features is at least a threshold.

    Args:
        values: Of the pool. [S, D]
        rows: Of those that are asked about. [R]
        others: What they must not be near to. [H, D]
        threshold: Of the cosine.
        report: Called now and then with the number of rows done so far.
    """
    near = found_in(values, rows, others)  # by rounding a copy may come second, behind one that is merely alike
    for first in range(0, len(rows), _QUERIES):
        some = slice(first, first + _QUERIES)
        near[some] |= nearest(others, values[rows[some]], 1)[0][:, 0] >= threshold
        report(min(len(rows), first + _QUERIES))
    return rows[near]


def whole_groups(rows: Indices, members: Sequence[Indices]) -> Indices:
    """Some rows, and those that are in a group with one of them, ascending.

    Args:
        rows: Such as those near to what is held out. [R]
        members: Rows of each group of near-duplicates.

    Source: arXiv 2304.07193, appendix A.3, relative deduplication.
    """
    near = set(rows.tolist())
    touched = [group for group in members if not near.isdisjoint(group.tolist())]
    return np.unique(np.concatenate([rows, *touched]))


def retrieve(values: Values, rows: Indices, seeds: Values, k: int, report: Report = lambda done: None) -> Indices:
    """The k nearest of some rows to each seed, each row once.

    Args:
        values: Of the pool. [S, D]
        rows: That may be taken. [R]
        seeds: What the images are to be like. [Q, D]
        k: Images for each seed.
        report: Called now and then with the number of seeds done so far.

    Source: arXiv 2304.07193, appendix A.4, sample-based.
    """
    found = np.zeros(len(values), bool)
    for first in range(0, len(seeds), _QUERIES):
        block = seeds[first : first + _QUERIES]
        found[nearest(values, block, min(k, len(rows)), among=rows)[1]] = True
        report(first + len(block))
    return np.flatnonzero(found)


def clusters(values: Values, rows: Indices, count: int, seed: int) -> Floats:
    """Centers of spherical k-means of some rows, of unit length. [count, D]

    Raises:
        DinoError: There are fewer images than clusters.
    """
    if not 1 <= count <= len(rows):
        raise DinoError(
            f"--clusters should be between 1 and {len(rows)}, the images that are left; it is {count}", "fewer"
        )
    width = values.shape[1]
    most = max(count, min(count * _LEARN, _LEARN_BYTES // (4 * width)))
    drawn = np.random.default_rng(seed).permutation(len(rows))[:most]
    options = {"min_points_per_centroid": 1, "max_points_per_centroid": len(rows)}
    means = faiss.Kmeans(width, count, niter=_ROUNDS, seed=seed, spherical=True, **options)
    means.train(unit(values[rows[np.sort(drawn)]]))
    return unit(np.asarray(means.centroids))


def assign(values: Values, rows: Indices, centers: Floats, report: Report = lambda done: None) -> Indices:
    """Number of the nearest center of each of some rows. [R]"""
    found = np.empty(len(rows), np.int64)
    for first in range(0, len(rows), _QUERIES):
        asked = rows[first : first + _QUERIES]
        found[first : first + len(asked)] = nearest(centers, values[asked], 1)[1][:, 0]
        report(first + len(asked))
    return found


def sample(rows: Indices, of: Indices, each: int, seed: int, among: Indices | None = None) -> Indices:
    """So many rows of each cluster, drawn by chance; all of a smaller one.

    Args:
        rows: [R]
        of: Cluster of each. [R]
        each: How many of a cluster.
        seed: Of the draw.
        among: Clusters that count; absent, all.

    Source: arXiv 2304.07193, appendix A.4, cluster-based.
    """
    order = np.random.default_rng(seed).permutation(len(rows))
    order = order[np.argsort(of[order], kind="stable")]  # clusters one after another, each in an order of chance
    begins = np.flatnonzero(np.diff(of[order], prepend=-1))
    place = np.arange(len(rows)) - np.repeat(begins, np.diff(begins, append=len(rows)))
    taken = order[place < each]
    if among is not None:
        taken = taken[np.isin(of[taken], among)]
    return np.sort(rows[taken])


def held(of_seeds: Indices, least: int = HELD) -> Indices:
    """Clusters that hold at least so many seeds."""
    found, seeds = np.unique(of_seeds, return_counts=True)
    return found[seeds >= least]
