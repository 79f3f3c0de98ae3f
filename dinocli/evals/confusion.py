"""Confusion matrix: counts of images by true and predicted class, and the accuracy of each class."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class ClassAccuracy:
    """Accuracy of one class.

    Attributes:
        images: Number of its test images.
        accuracy: Percent of its images whose predicted class is correct.
        mistaken_for: Most frequent wrong class of its images, or None.
        mistakes: Number of its images with that wrong class.
    """

    name: str
    images: int
    accuracy: float
    mistaken_for: str | None
    mistakes: int


def confusion(truth: NDArray[np.int64], predicted: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """Count images by true class (row) and predicted class (column). [Q], [Q] -> [K, K]"""
    return np.bincount(truth * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def class_accuracies(table: NDArray[np.int64], classes: list[str]) -> list[ClassAccuracy]:
    """Return the accuracy of each class that has test images, the lowest first.

    Args:
        table: Confusion matrix. [K, K]
        classes: Names of the K classes.
    """
    rows = []
    for i in np.flatnonzero(table.sum(1)).tolist():
        wrong = table[i].copy()
        wrong[i] = 0
        worst, images = int(wrong.argmax()), int(table[i].sum())
        mistakes = int(wrong[worst])
        rows.append(
            ClassAccuracy(
                classes[i], images, 100 * int(table[i, i]) / images, classes[worst] if mistakes else None, mistakes
            )
        )
    return sorted(rows, key=lambda row: row.accuracy)
