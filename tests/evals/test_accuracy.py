from __future__ import annotations

import numpy as np
import pytest

from dinocli.evals.accuracy import average_precision, hits_among, interval_of, macro_accuracy, ranks_of


def test_top_1_and_top_k_hits_are_counted() -> None:
    scores = np.array([[3.0, 2, 1, 0], [0, 1, 2, 3], [1, 1, 0, 0]])
    assert hits_among(scores, np.array([0, 2, 1]), 2).tolist() == [1, 3]
    assert hits_among(scores, np.array([3, 0, 0]), 1).tolist() == [1, 1]


def test_excluded_unknown_and_nan_classes_are_no_hits() -> None:
    scores = np.array([[-np.inf, 1.0, -np.inf]])
    assert hits_among(scores, np.array([0]), 3).tolist() == [0, 0]
    assert hits_among(np.array([[0.0, 1.0, 0.0]]), np.array([2]), 3, above=0).tolist() == [0, 0]
    assert hits_among(np.array([[0.0, 1.0]]), np.array([-1]), 2).tolist() == [0, 0], "unknown class"
    assert hits_among(np.array([[0.0, np.nan]]), np.array([1]), 2).tolist() == [0, 0], "a score that is NaN"


def test_hits_equal_those_of_a_full_sort() -> None:
    generator = np.random.default_rng(0)
    scores = generator.integers(0, 4, (200, 9)).astype(np.float64)  # with many ties
    truth = generator.integers(0, 9, 200)
    order = np.argsort(-scores, axis=1, kind="stable")
    for among in (1, 3, 9):
        right = order[:, :among] == truth[:, None]
        assert hits_among(scores, truth, among).tolist() == [right[:, 0].sum(), right.any(1).sum()]


def test_a_row_that_cannot_be_a_hit_has_no_rank_among_the_classes() -> None:
    scores = np.array([[0.0, 0.0], [0.0, 1.0], [2.0, 1.0]])
    assert ranks_of(scores, np.array([0, -1, 1]), above=0).tolist() == [2**63 - 1, 2**63 - 1, 1]
    assert hits_among(scores, np.array([0, -1, 1]), 5, above=0).tolist() == [0, 1]


def test_the_interval_is_wilsons() -> None:
    # Newcombe 1998, table I: 81 of 263, and 0 of 20.
    assert interval_of(81, 263) == pytest.approx((25.53, 36.62), abs=0.005)
    assert interval_of(0, 20) == pytest.approx((0, 16.11), abs=0.005)
    assert interval_of(20, 20) == pytest.approx((83.89, 100), abs=0.005)
    assert str(interval_of(81, 263)) == "25.5 to 36.6"
    with pytest.raises(ValueError, match="no images"):
        interval_of(0, 0)


def test_macro_accuracy_weighs_classes_equally() -> None:
    truth = np.array([0] * 8 + [2] * 2)
    assert macro_accuracy(truth == 0, truth) == 50
    assert macro_accuracy(np.array([True] * 9 + [False]), truth) == 75


def test_average_precision_equals_its_definition() -> None:
    rng = np.random.default_rng(0)
    scores, truth = rng.normal(size=(30, 4)).round(1), rng.random((30, 4)) < 0.3
    truth[:, 2] = False  # a class without images does not count
    found = average_precision(scores, truth)
    expected = []
    for k in (0, 1, 3):
        above = [scores[:, k] >= score for score in scores[truth[:, k], k]]
        expected.append(np.mean([truth[rows, k].mean() for rows in above]))
    np.testing.assert_allclose(found, expected)
