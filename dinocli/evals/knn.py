"""k-NN classification: the nearest training images vote on the class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from dinocli.core.errors import DinoError
from dinocli.evals.accuracy import hits_among, ranks_of
from dinocli.evals.nearest import nearest
from dinocli.features.store import Features

# Block sizes bound the memory; each block of queries reads all voters once.
_QUERIES = 16384
_CELLS = 2**22  # votes per block: queries times classes


@dataclass(frozen=True)
class Score:
    """Accuracy for one k.

    Attributes:
        k: Number of voting neighbours.
        top1: Percent of queries whose class has the most votes.
        top5: Percent of queries whose class is among the five with the most votes, or `min(k, 5)` for small k.
    """

    k: int
    top1: float
    top5: float


@dataclass(frozen=True)
class KnnResult:
    """k-NN accuracies.

    Attributes:
        scores: One score per k, in the given order.
        queries: Number of classified images.
        neighbours: Number of images that can vote.
        classes: Number of classes.
        leave_one_out: True if queries and voters are the same images; no image votes on itself.
        temperature: Temperature of the votes.
    """

    scores: list[Score]
    queries: int
    neighbours: int
    classes: int
    leave_one_out: bool
    temperature: float


def knn(train: Features, test: Features | None, ks: Sequence[int], temperature: float = 0.07) -> KnnResult:
    """Classify by the weighted vote of the k nearest images in cosine similarity.

    Args:
        train: Labelled images that vote.
        test: Labelled images to classify. If None, each training image is classified by the others.
        ks: Numbers of neighbours.
        temperature: Temperature of the votes; each weighs exp(similarity / temperature).

    Raises:
        DinoError: If a k is below 1 or above the number of voters, or there are no voters or queries.

    Source: arXiv 2104.14294, section 4.1; facebookresearch/dino@7c446df eval_knn.py.
    """
    voters = votable(train, test)
    for k in ks:
        if k < 1:
            raise DinoError(f"--k {k} is below 1", f"use --k {min(20, voters)}")
        if k > voters:
            whose = "training images" if test is not None else "other images that can vote"
            raise DinoError(
                f"--k {k} is larger than the {voters} {whose}", f"use --k {voters}" + " or fewer" * (voters > 1)
            )
    queries = train if test is None else test
    ascending = sorted(set(ks))
    hits = np.zeros((len(ascending), 2), dtype=np.int64)
    for first in range(0, len(queries), _QUERIES):
        block = slice(first, first + _QUERIES)
        similarities, rows = nearest(train.values, queries.values[block], ascending[-1] + (test is None))
        if test is None:
            similarities, rows = _drop_self(similarities, rows, first)
        hits += _count_hits(similarities, train.labels[rows], queries.labels[block], ascending, train, temperature)
    percents = dict(zip(ascending, (100 * hits / len(queries)).tolist(), strict=True))
    scores = [Score(k, *percents[k]) for k in ks]
    return KnnResult(scores, len(queries), voters, len(train.classes), test is None, temperature)


def is_correct(train: Features, test: Features | None, k: int, temperature: float = 0.07) -> NDArray[np.bool_]:
    """Return True for each query that `knn` classifies correctly. [Q]

    Args:
        train: Labelled images that vote.
        test: Labelled images to classify. If None, each training image is classified by the others.
        k: Number of neighbours, which must be valid for `knn`.
        temperature: Temperature of the votes.
    """
    queries = train if test is None else test
    correct: list[NDArray[np.bool_]] = []
    for first in range(0, len(queries), _QUERIES):
        block = slice(first, first + _QUERIES)
        similarities, rows = nearest(train.values, queries.values[block], k + (test is None))
        if test is None:
            similarities, rows = _drop_self(similarities, rows, first)
        totals = votes(similarities, train.labels[rows], [k], len(train.classes), temperature)
        correct += [ranks_of(some, queries.labels[block], above=0) == 0 for some in totals]
    return np.concatenate(correct)


def votable(train: Features, test: Features | None) -> int:
    """Return the number of images that can vote on each query, which is the largest valid k.

    Raises:
        DinoError: If there are no voters or no queries.
    """
    voters = len(train) - (test is None)
    if voters < 1:
        needed = "at least two images" if test is None else "training images"
        raise DinoError(
            f"k-NN needs {needed}; the features have {len(train)}", "dino extract CHECKPOINT IMAGES, with more images"
        )
    if test is not None and not len(test):
        raise DinoError("the test split of these features holds no images", "dino extract CHECKPOINT IMAGES again")
    return voters


def votes(
    similarities: NDArray[np.float32], labels: NDArray[np.int64], ks: Sequence[int], classes: int, temperature: float
) -> Iterator[NDArray[np.float64]]:
    """Sum the votes per class for every k, in one pass through the neighbours.

    Args:
        similarities: Similarities of each query's neighbours, in descending order. [Q, K], K >= all `ks`
        labels: Labels of each query's neighbours. [Q, K]
        ks: Numbers of neighbours, ascending.
        classes: Number of classes.
        temperature: Temperature of the votes; each weighs exp(similarity / temperature).

    Yields:
        Votes for one k, in units of the nearest neighbour's vote. The array is overwritten for the next k. [Q, classes]
    """
    # Dividing by the nearest neighbour's weight changes no ranking and prevents overflow at low temperatures.
    weights = np.exp((similarities.astype(np.float64) - similarities[:, :1]) / temperature)
    cells = labels + np.arange(len(labels))[:, None] * classes
    totals = np.zeros(len(labels) * classes)
    for fewer, k in pairwise([0, *ks]):
        np.add.at(totals, cells[:, fewer:k].ravel(), weights[:, fewer:k].ravel())
        yield totals.reshape(len(labels), classes)


def _count_hits(
    similarities: NDArray[np.float32],
    labels: NDArray[np.int64],
    truth: NDArray[np.int64],
    ks: Sequence[int],
    train: Features,
    temperature: float,
) -> NDArray[np.int64]:
    """Count the queries with the correct class first, and among the top five, for each k. [ks, 2]"""
    classes = len(train.classes)
    hits = np.zeros((len(ks), 2), dtype=np.int64)
    step = max(1, _CELLS // max(classes, ks[-1]))
    for start in range(0, len(truth), step):
        rows = slice(start, start + step)
        for i, totals in enumerate(votes(similarities[rows], labels[rows], ks, classes, temperature)):
            # A class without votes is no answer, even if fewer than five classes have votes.
            hits[i] += hits_among(totals, truth[rows], min(5, ks[i]), above=0)
    return hits


def _drop_self(
    similarities: NDArray[np.float32], rows: NDArray[np.int64], first: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Remove each query from its own neighbours; queries are the rows from `first`. [Q, k+1] -> [Q, k]"""
    # An image is usually its own nearest neighbour, but an exact copy may come first.
    is_self = rows == np.arange(first, first + len(rows))[:, None]
    is_self[~is_self.any(1), -1] = True
    return similarities[~is_self].reshape(len(rows), -1), rows[~is_self].reshape(len(rows), -1)
