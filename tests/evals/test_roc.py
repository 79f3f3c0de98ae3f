from __future__ import annotations

import numpy as np
import pytest

from dinocli.evals.roc import auroc


def by_pairs(scores: np.ndarray, positive: np.ndarray) -> float:
    """The definition: the share of pairs in the right order, ties as one half."""
    above, below = scores[positive], scores[~positive]
    return float(np.mean((above[:, None] > below) + 0.5 * (above[:, None] == below)))


@pytest.mark.parametrize("distinct", [1, 2, 7, 10**6])
def test_the_area_is_the_share_of_pairs_in_the_right_order(distinct: int) -> None:
    rng = np.random.default_rng(distinct)
    scores = rng.integers(distinct, size=300).astype(np.float32)
    positive = rng.random(300) < 0.3
    assert auroc(scores, positive) == pytest.approx(by_pairs(scores, positive), abs=1e-12)
    assert auroc(-scores, positive) == pytest.approx(1 - by_pairs(scores, positive), abs=1e-12)


def test_the_area_is_that_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(20, size=500), rng.random(500) < 0.5
    assert auroc(scores, positive) == pytest.approx(metrics.roc_auc_score(positive, scores), abs=1e-12)


def test_both_groups_are_needed() -> None:
    assert auroc(np.array([1.0, 2.0]), np.array([False, True])) == 1
    with pytest.raises(ValueError, match="2 positives and 0 negatives"):
        auroc(np.array([1.0, 2.0]), np.array([True, True]))
