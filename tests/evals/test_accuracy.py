from __future__ import annotations

import numpy as np

from dinocli.evals.accuracy import hits_among


def test_first_and_among_the_first() -> None:
    scores = np.array([[3.0, 2, 1, 0], [0, 1, 2, 3], [1, 1, 0, 0]])
    assert hits_among(scores, np.array([0, 2, 1]), 2).tolist() == [1, 3]
    assert hits_among(scores, np.array([3, 0, 0]), 1).tolist() == [1, 1]


def test_what_is_out_of_the_running_is_no_hit() -> None:
    scores = np.array([[-np.inf, 1.0, -np.inf]])
    assert hits_among(scores, np.array([0]), 3).tolist() == [0, 0]
