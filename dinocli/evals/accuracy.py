"""How often a classifier is right."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def hits_among(scores: NDArray[Any], truth: NDArray[np.int64], among: int = 5) -> NDArray[np.int64]:
    """How many rows have their true class first, and how many among the first few. [2]

    Args:
        scores: Of each class; of equal ones the lower class goes first, and -inf is never a hit. [Q, classes]
        truth: [Q]
        among: How many the few are.
    """
    order = np.argsort(-scores, axis=1, kind="stable")[:, :among]
    right = (order == truth[:, None]) & (np.take_along_axis(scores, order, 1) > -np.inf)
    return np.array([right[:, 0].sum(), right.any(1).sum()])
