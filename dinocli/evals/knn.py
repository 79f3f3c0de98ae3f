"""k-NN classification: the nearest training images vote on the class."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinocli.core.errors import DinoError
from dinocli.core.tensors import Values
from dinocli.evals.accuracy import Interval, interval_of, macro_accuracy, ranks_of
from dinocli.evals.balance import spaced_rows
from dinocli.evals.calibration import CALIBRATED, Calibration, fit_temperature
from dinocli.evals.nearest import nearest
from dinocli.evals.predictions import Predictions, joined, predict
from dinocli.features.store import Features

# Block sizes bound the memory; each block of queries reads all voters once.
_QUERIES = 16384
_CELLS = 2**22  # votes per block: queries times classes


# Function from queries [Q, D] and k to the cosines and rows of the nearest features, [Q, k] each, as of `nearest`.
Search = Callable[[NDArray[Any], int], tuple[NDArray[np.float32], NDArray[np.int64]]]


@dataclass(frozen=True)
class Score:
    """Accuracy for one k.

    Attributes:
        k: Number of voting neighbours.
        top1: Percent of queries whose class has the most votes.
        macro: Top-1 accuracy averaged over classes, in percent.
        top5: Percent of queries whose class is among the five with the most votes, or `min(k, 5)` for small k.
    """

    k: int
    top1: float
    interval: Interval
    macro: float
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


def knn(
    train: Features, test: Features | None, ks: Sequence[int], temperature: float = 0.07, search: Search | None = None
) -> KnnResult:
    """Classify by the weighted vote of the k nearest images in cosine similarity.

    Args:
        train: Labelled images that vote.
        test: Labelled images to classify. If None, each training image is classified by the others.
        ks: Numbers of neighbours.
        temperature: Temperature of the votes; each weighs exp(similarity / temperature).
        search: Search among the training features. If None, the exact one.

    Raises:
        DinoError: If a k is below 1 or above the number of voters, or there are no voters or queries.

    Source: arXiv 2104.14294, section 4.1; facebookresearch/dino@7c446df eval_knn.py.
    """
    voters = check_ks(train, test, ks)
    queries = train if test is None else test
    ascending = sorted(set(ks))
    ranks = np.empty((len(ascending), len(queries)), dtype=np.int64)
    own = _rows_if(test is None, queries)
    for block, similarities, rows in _neighbours(train, queries.values, ascending[-1], own, search):
        ranks[:, block] = _rank(similarities, train.labels[rows], queries.labels[block], ascending, train, temperature)
    scores = {k: _score(k, some, queries.labels) for k, some in zip(ascending, ranks, strict=True)}
    return KnnResult([scores[k] for k in ks], len(queries), voters, len(train.classes), test is None, temperature)


def predict_by_votes(
    train: Features, test: Features | None, ks: Sequence[int], temperature: float = 0.07, search: Search | None = None
) -> tuple[int, Calibration, Predictions]:
    """Predict each test image by the vote, with the k that is best in leave-one-out on training images.

    The temperature of the confidences is fitted on the same leave-one-out votes, of at most 10,000 images.

    Args:
        train: Labelled images that vote.
        test: Labelled images to classify. If None, each training image is classified by the others.
        ks: Numbers of neighbours to choose from, which must be valid for `knn`.
        temperature: Temperature of the votes.
        search: Search among the training features. If None, the exact one.

    Returns:
        Chosen k, calibration, and predictions.
    """
    others = [k for k in ks if k < len(train)] or [len(train) - 1]
    rows = spaced_rows(len(train), CALIBRATED)
    truth = train.labels[rows]
    chosen, logits, hits = others[0], np.empty(0), -1
    for k in others:
        found = np.concatenate(list(vote_logits(train, train.values[rows], k, temperature, rows, search)))
        correct = int((found.argmax(1) == truth).sum())
        if correct > hits:
            chosen, logits, hits = k, found, correct
    softness = fit_temperature(logits, truth)
    queries = train if test is None else test
    own = _rows_if(test is None, queries)
    parts, first = list[Predictions](), 0
    for block in vote_logits(train, queries.values, chosen, temperature, own, search):
        some = slice(first, first + len(block))
        labels, first = queries.labels[some], some.stop
        # A class without votes is no answer.
        ranks = ranks_of(block, labels, above=_logits(np.zeros(1), len(train.classes))[0])
        parts.append(predict(queries.paths[some], labels, block, softness, ranks))
    predictions = joined(parts)
    how = "training images, each by the others"
    return chosen, Calibration(softness, len(rows), how, *predictions.errors), predictions


def vote_logits(
    train: Features,
    queries: Values,
    k: int,
    temperature: float,
    own: NDArray[np.int64] | None = None,
    search: Search | None = None,
) -> Iterator[NDArray[np.float64]]:
    """Yield the logarithms of the votes for blocks of queries. [B, classes]

    One vote as heavy as that of the nearest neighbour is added, shared by all classes. So a class without votes has a
    small probability, not none.

    Args:
        train: Labelled images that vote.
        queries: Features to classify. [Q, D]
        k: Number of neighbours, fewer than the images that vote if the queries are among them.
        temperature: Temperature of the votes.
        own: Row of each query among the voters, which then does not vote on itself. If None, all vote. [Q]
        search: Search among the training features. If None, the exact one.
    """
    classes = len(train.classes)
    for _, similarities, rows in _neighbours(train, queries, k, own, search):
        step = max(1, _CELLS // max(classes, k))
        for start in range(0, len(rows), step):
            some = slice(start, start + step)
            [totals] = votes(similarities[some], train.labels[rows[some]], [k], classes, temperature)
            yield _logits(totals, classes)


def _logits(totals: NDArray[np.float64], classes: int) -> NDArray[np.float64]:
    return np.log(totals + 1 / classes)


def _rows_if(leave_one_out: bool, queries: Features) -> NDArray[np.int64] | None:
    return np.arange(len(queries)) if leave_one_out else None


def _neighbours(
    train: Features, queries: Values, k: int, own: NDArray[np.int64] | None, search: Search | None = None
) -> Iterator[tuple[slice, NDArray[np.float32], NDArray[np.int64]]]:
    """Yield the similarities and rows of the k nearest images for blocks of queries, without each query itself."""
    for first in range(0, len(queries), _QUERIES):
        block = slice(first, first + _QUERIES)
        count = k + (own is not None)
        similarities, rows = search(queries[block], count) if search else nearest(train.values, queries[block], count)
        if own is not None:
            similarities, rows = _drop_self(similarities, rows, own[block])
        yield block, similarities, rows


def _score(k: int, ranks: NDArray[np.int64], truth: NDArray[np.int64]) -> Score:
    correct, among = ranks == 0, int((ranks < min(5, k)).sum())
    interval, macro = interval_of(int(correct.sum()), len(truth)), macro_accuracy(correct, truth)
    return Score(k, float(100 * correct.sum() / len(truth)), interval, macro, 100 * among / len(truth))


def is_correct(train: Features, test: Features | None, k: int, temperature: float = 0.07) -> NDArray[np.bool_]:
    """Return True for each query that `knn` classifies correctly. [Q]

    Args:
        train: Labelled images that vote.
        test: Labelled images to classify. If None, each training image is classified by the others.
        k: Number of neighbours, which must be valid for `knn`.
        temperature: Temperature of the votes.
    """
    queries = train if test is None else test
    ranks = [
        _rank(similarities, train.labels[rows], queries.labels[block], [k], train, temperature)[0]
        for block, similarities, rows in _neighbours(train, queries.values, k, _rows_if(test is None, queries))
    ]
    return np.concatenate(ranks) == 0


def check_ks(train: Features, test: Features | None, ks: Sequence[int]) -> int:
    """Check numbers of neighbours, and return the number of images that can vote.

    Raises:
        DinoError: If a k is below 1 or above the number of voters, or there are no voters or queries.
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
    return voters


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
    # Dividing by the nearest neighbour's weight changes no ranking and prevents overflow at low temperatures. A
    # neighbour that an approximate search did not find has the similarity -inf and no weight.
    most = np.maximum(similarities[:, :1], -1)
    weights = np.exp((similarities.astype(np.float64) - most) / temperature)
    cells = labels + np.arange(len(labels))[:, None] * classes
    totals = np.zeros(len(labels) * classes)
    for fewer, k in pairwise([0, *ks]):
        np.add.at(totals, cells[:, fewer:k].ravel(), weights[:, fewer:k].ravel())
        yield totals.reshape(len(labels), classes)


def _rank(
    similarities: NDArray[np.float32],
    labels: NDArray[np.int64],
    truth: NDArray[np.int64],
    ks: Sequence[int],
    train: Features,
    temperature: float,
) -> NDArray[np.int64]:
    """Return the rank of each query's class for each k. [ks, Q]"""
    classes = len(train.classes)
    ranks = np.empty((len(ks), len(truth)), dtype=np.int64)
    step = max(1, _CELLS // max(classes, ks[-1]))
    for start in range(0, len(truth), step):
        rows = slice(start, start + step)
        for i, totals in enumerate(votes(similarities[rows], labels[rows], ks, classes, temperature)):
            # A class without votes is no answer, even if fewer than five classes have votes.
            ranks[i, rows] = ranks_of(totals, truth[rows], above=0)
    return ranks


def _drop_self(
    similarities: NDArray[np.float32], rows: NDArray[np.int64], own: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Remove each query from its own neighbours; `own` is its row. [Q, k+1] -> [Q, k]"""
    # An image is usually its own nearest neighbour, but an exact copy may come first.
    is_self = rows == own[:, None]
    is_self[~is_self.any(1), -1] = True
    return similarities[~is_self].reshape(len(rows), -1), rows[~is_self].reshape(len(rows), -1)
