from __future__ import annotations

import numpy as np
import pytest

from dinocli.evals.balance import describe_imbalance, number_within


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize(("count", "classes"), [(0, 3), (1, 1), (9, 1), (1000, 17)])
def test_rows_of_a_label_are_numbered_in_their_order(count: int, classes: int, dtype: type) -> None:
    labels = np.random.default_rng(0).integers(-1, classes, count).astype(dtype)
    seen: dict[int, int] = {}
    expected = []
    for label in labels.tolist():
        expected.append(seen.get(label, 0))
        seen[label] = expected[-1] + 1
    assert number_within(labels).tolist() == expected


def test_labels_are_sorted_once_however_many_classes_there_are() -> None:
    """A pass over all labels per class takes a minute for a million images of 10,000 classes."""
    passes = 0

    class Counted(np.ndarray):
        def __array_ufunc__(self, ufunc, method, *inputs, **options):  # type: ignore[no-untyped-def]
            nonlocal passes
            passes += 1
            return getattr(ufunc, method)(*(np.asarray(x) for x in inputs), **options)

    labels = np.random.default_rng(0).integers(0, 500, 2000)
    numbers = number_within(labels.view(Counted))
    assert passes < 10
    np.testing.assert_array_equal(numbers, number_within(labels))


def test_an_imbalance_above_three_is_described() -> None:
    labels = np.array([0] * 31 + [1] * 10 + [3] * 12)
    line = describe_imbalance(labels, ["cat", "dog", "none", "owl"])
    assert line.startswith("imbalanced classes: cat has 31 training images, dog has 10;")
    assert describe_imbalance(labels[1:], ["cat", "dog", "none", "owl"]) == "", "three times as many are normal"
    assert describe_imbalance(labels[:31], ["cat"]) == ""
