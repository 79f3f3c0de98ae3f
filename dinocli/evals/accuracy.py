"""How often a classifier is right."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def hits_among(
    scores: NDArray[Any], truth: NDArray[np.int64], among: int = 5, above: float = -np.inf
) -> NDArray[np.int64]:
    """How many rows have their true class first, and how many among the first few. [2]

    Args:
        scores: Of each class; of equal ones the lower class goes first. [Q, classes]
        truth: Below 0 where it is not known, and then never hit. [Q]
        among: How many the few are.
        above: A true class whose score is no higher is never a hit.
    """
    # How many classes go before the true one says as much as an order of them all, in a tenth of the time.
    true = scores[np.arange(len(truth)), truth][:, None]
    before = np.count_nonzero(scores > true, axis=1)
    before += np.count_nonzero((scores == true) & (np.arange(scores.shape[1]) < truth[:, None]), axis=1)
    right = (truth >= 0) & (true[:, 0] > above)
    return np.array([(right & (before < most)).sum() for most in (1, among)])
