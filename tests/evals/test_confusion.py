from __future__ import annotations

import numpy as np

from dinocli.evals.confusion import class_accuracies, confusion

TRUTH, PREDICTED = np.array([0, 0, 0, 1, 1, 3]), np.array([0, 1, 1, 1, 0, 3])


def test_rows_are_true_classes_and_columns_are_predicted_ones() -> None:
    assert confusion(TRUTH, PREDICTED, 4).tolist() == [[1, 2, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]


def test_the_lowest_accuracy_comes_first_and_classes_without_images_are_omitted() -> None:
    cat, dog, fox = class_accuracies(confusion(TRUTH, PREDICTED, 4), ["cat", "dog", "owl", "fox"])
    assert (cat.name, cat.images, round(cat.accuracy, 1), cat.mistaken_for, cat.mistakes) == ("cat", 3, 33.3, "dog", 2)
    assert (dog.name, dog.accuracy, dog.mistaken_for, dog.mistakes) == ("dog", 50, "cat", 1)
    assert (fox.name, fox.accuracy, fox.mistaken_for, fox.mistakes) == ("fox", 100, None, 0)
