"""k-NN: the nearest training images vote on the class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import faiss
import numpy as np
from numpy.typing import NDArray

from dinocli.errors import DinoError
from dinocli.evals.accuracy import hits_among
from dinocli.features import Features

_ROWS = 4096  # queries whose votes are counted at once: [rows, classes] stays small


@dataclass(frozen=True)
class Score:
    """Accuracy for one k.

    Attributes:
        k: Neighbours that vote.
        top1: Percent of queries whose class has the most votes.
        top5: Percent of queries whose class is among the five with the most; among `min(k, 5)` for small k.
    """

    k: int
    top1: float
    top5: float


@dataclass(frozen=True)
class KnnResult:
    """k-NN accuracies.

    Attributes:
        scores: One a k, in the order asked for.
        queries: Images that were classified.
        neighbours: Images that could vote.
        classes: How many there are.
        leave_one_out: Whether queries and voters are the same images, none voting on itself.
        temperature: Of the vote.
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
        test: Labelled images to classify; absent, each training image is classified by the others.
        ks: Numbers of neighbours.
        temperature: A vote weighs exp(similarity / temperature).

    Raises:
        DinoError: A k is below 1 or above the number of voters.

    Source: arXiv 2104.14294, section 4.1; facebookresearch/dino@7c446df eval_knn.py.
    """
    voters = len(train) - (test is None)
    for k in ks:
        if not 1 <= k <= voters:
            raise DinoError(
                f"--k should be between 1 and {voters}, the images that can vote; it is {k}",
                f"--k {min(20, voters)}" if voters else "extract more than one image",
            )
    queries = train if test is None else test
    similarities, labels = _search(train, queries, max(ks), leave_one_out=test is None)
    scores = []
    for k in ks:
        hits = np.zeros(2, dtype=np.int64)
        for start in range(0, len(queries), _ROWS):
            rows = slice(start, start + _ROWS)
            votes = vote(similarities[rows, :k], labels[rows, :k], len(train.classes), temperature)
            # A class that nobody voted for is no answer, even where fewer than five got a vote.
            hits += hits_among(np.where(votes > 0, votes, -np.inf), queries.labels[rows], min(5, k))
        top1, top5 = (100 * hits / len(queries)).tolist()
        scores.append(Score(k, top1, top5))
    return KnnResult(scores, len(queries), voters, len(train.classes), test is None, temperature)


def vote(
    similarities: NDArray[np.float32], labels: NDArray[np.int64], classes: int, temperature: float
) -> NDArray[np.float64]:
    """Weight of the votes for each class.

    Args:
        similarities: Of each query's neighbours. [Q, k]
        labels: Of each query's neighbours. [Q, k]
        classes: How many there are.
        temperature: A vote weighs exp(similarity / temperature).

    Returns:
        In units of the nearest neighbour's vote. [Q, classes]
    """
    rows = np.arange(len(labels))[:, None] * classes
    # Relative to the nearest, which changes no vote and keeps a low temperature from overflowing.
    nearer = similarities.astype(np.float64) - similarities.max(axis=1, keepdims=True)
    weights = np.exp(nearer / temperature)
    cells = np.bincount((rows + labels).ravel(), weights.ravel(), minlength=len(labels) * classes)
    return cells.astype(np.float64, copy=False).reshape(len(labels), classes)


def _search(
    train: Features, queries: Features, k: int, *, leave_one_out: bool
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Similarities and labels of each query's k nearest voters, the nearest first. [Q, k] each"""
    index = faiss.IndexFlatIP(train.values.shape[1])
    bank = _normalized(train.values)
    index.add(bank)
    wanted = _normalized(queries.values) if queries is not train else bank
    similarities, found = index.search(wanted, k + leave_one_out)
    if leave_one_out:
        # An image is mostly its own nearest neighbour, but an exact copy of it may come first.
        itself = found == np.arange(len(found))[:, None]
        itself[~itself.any(1), -1] = True
        similarities, found = similarities[~itself].reshape(-1, k), found[~itself].reshape(-1, k)
    return similarities, train.labels[found]


def _normalized(values: NDArray[np.float32]) -> NDArray[np.float32]:
    values = np.ascontiguousarray(values, dtype=np.float32)
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)
