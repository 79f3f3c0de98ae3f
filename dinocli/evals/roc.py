"""Area under the ROC curve: the separation of two groups by a score, without a threshold."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def auroc(scores: NDArray[Any], positive: NDArray[np.bool_]) -> float:
    """Return the probability that a positive has a higher score than a negative; a tie counts as one half.

    Args:
        scores: Score of each item. [S]
        positive: True for each positive. [S]

    Raises:
        ValueError: If either group is empty.
    """
    positives = int(np.count_nonzero(positive))
    negatives = len(positive) - positives
    if not positives or not negatives:
        raise ValueError(f"{positives} positives and {negatives} negatives; expected at least one of each")
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    # One point of the curve per distinct score, so that the order within a tie has no effect.
    last = np.append(np.flatnonzero(ordered[1:] != ordered[:-1]), len(ordered) - 1)
    hits = np.concatenate([[0], np.cumsum(positive[order])[last]]).astype(np.float64)
    alarms = np.concatenate([[0], last + 1]) - hits
    area = float(np.sum((alarms[1:] - alarms[:-1]) * (hits[1:] + hits[:-1]) / 2))
    return area / (positives * negatives)
