"""Accuracy: top-1, top-k, mean over classes and its confidence interval; average precision for several classes."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_NORMAL = 1.959963984540054  # 97.5 % quantile of the normal distribution: a two-sided 95 % interval


class Interval(NamedTuple):
    """95 % interval of an accuracy, in percent."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.low:.1f} to {self.high:.1f}"


def interval_of(correct: int, images: int) -> Interval:
    """Return the 95 % interval of an accuracy that was measured on a sample of images.

    Raises:
        ValueError: If there are no images.

    Source: Wilson 1927. Unlike the normal interval, it stays within 0 and 100 and is not empty at these ends.
    """
    if not images:
        raise ValueError("no images; expected at least one")
    share, z2 = correct / images, _NORMAL**2 / images
    middle = (share + z2 / 2) / (1 + z2)
    half = math.sqrt(share * (1 - share) * z2 + z2 * z2 / 4) / (1 + z2)
    return Interval(100 * max(0.0, middle - half), 100 * min(1.0, middle + half))


def macro_accuracy(correct: NDArray[np.bool_], truth: NDArray[np.int64]) -> float:
    """Return the mean over classes of the share of correct images, in percent. [Q], [Q]"""
    images = np.bincount(truth)
    shares = np.bincount(truth, correct)[images > 0] / images[images > 0]
    return float(100 * shares.mean())


def hits_among(
    scores: NDArray[Any], truth: NDArray[np.int64], among: int = 5, above: float = -np.inf
) -> NDArray[np.int64]:
    """Count the rows whose true class ranks first, and those whose true class ranks among the top few. [2]

    Args:
        scores: Score of each class; ties go to the lower class. [Q, classes]
        truth: True class per row; negative if unknown, which is never a hit. [Q]
        among: Number of top classes for the second count.
        above: Scores at or below this are never a hit.
    """
    ranks = ranks_of(scores, truth, above)
    return np.array([(ranks < k).sum() for k in (1, among)])


def ranks_of(scores: NDArray[Any], truth: NDArray[np.int64], above: float = -np.inf) -> NDArray[np.int64]:
    """Return the rank of the true class per row, from 0; a huge number if it cannot be a hit. [Q]

    Args:
        scores: Score of each class; ties go to the lower class. [Q, classes]
        truth: True class per row; negative if unknown, which is never a hit. [Q]
        above: Scores at or below this are never a hit.
    """
    # Counting the classes ahead of the true one replaces a full sort, in a tenth of the time.
    true_score = scores[np.arange(len(truth)), truth][:, None]
    ahead = np.count_nonzero(scores > true_score, axis=1)
    ahead += np.count_nonzero((scores == true_score) & (np.arange(scores.shape[1]) < truth[:, None]), axis=1)
    return np.where((truth >= 0) & (true_score[:, 0] > above), ahead, np.iinfo(np.int64).max)


def average_precision(scores: NDArray[Any], truth: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the average precision of each class that has an image; equal scores rank together.

    It is the mean, over the images of a class, of the share of its images among those that score as high or higher.

    Args:
        scores: Score of each class. [Q, K]
        truth: True for each class of an image. [Q, K]

    Returns:
        Values from 0 to 1, for the classes with an image, in order. [at most K]
    """
    found = []
    for column, own in zip(scores.T, truth.T, strict=True):
        if own.any():
            above = np.searchsorted(np.sort(-column), -column[own], side="right")  # images with this score or more
            hits = np.searchsorted(np.sort(-column[own]), -column[own], side="right")
            found.append((hits / above).mean())
    return np.array(found)
