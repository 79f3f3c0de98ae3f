"""Predictions of a classifier for labelled test images, one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dinocli.core.errors import DinoError
from dinocli.core.tables import first_line, write_table
from dinocli.evals.accuracy import Interval, interval_of, macro_accuracy, ranks_of
from dinocli.evals.calibration import expected_calibration_error, softmax

_COLUMNS = ("image", "class", "predicted", "confidence")


@dataclass(frozen=True, eq=False)
class Predictions:
    """Predictions for Q test images.

    Attributes:
        names: Names of the images. [Q]
        truth: Class of each image. [Q]
        predicted: Class with the highest score. [Q]
        confidence: Probability of the predicted class, at the classifier's temperature. [Q]
        uncalibrated: The same at a temperature of 1. [Q]
        ranks: Rank of the true class, from 0; a huge number if it cannot be a hit. [Q]
    """

    names: Sequence[str]
    truth: NDArray[np.int64]
    predicted: NDArray[np.int64]
    confidence: NDArray[np.float64]
    uncalibrated: NDArray[np.float64]
    ranks: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.truth)

    @property
    def correct(self) -> NDArray[np.bool_]:
        """True for each image whose class ranks first. [Q]"""
        return self.ranks == 0

    @property
    def interval(self) -> Interval:
        """95 % interval of the top-1 accuracy."""
        return interval_of(int(self.correct.sum()), len(self))

    @property
    def macro(self) -> float:
        """Top-1 accuracy averaged over classes, in percent."""
        return macro_accuracy(self.correct, self.truth)

    def percent(self, among: int) -> float:
        """Return the percent of images whose class ranks among the top few."""
        return float(100 * (self.ranks < among).sum() / len(self))

    @property
    def errors(self) -> tuple[float, float]:
        """Expected calibration error at a temperature of 1 and at the classifier's, in percent."""
        before, after = (expected_calibration_error(c, self.correct) for c in (self.uncalibrated, self.confidence))
        return before, after


def predict(
    names: Sequence[str],
    truth: NDArray[np.int64],
    logits: NDArray[np.floating],
    temperature: float = 1.0,
    ranks: NDArray[np.int64] | None = None,
) -> Predictions:
    """Return the predictions of logits.

    Args:
        names: Names of the images. [Q]
        truth: Class of each image. [Q]
        logits: Logits; ties go to the lower class. [Q, K]
        temperature: Divisor of the logits before the softmax.
        ranks: Rank of each true class. If None, by the logits. [Q]
    """
    predicted = logits.argmax(1)
    confidence, plain = (softmax(logits, t)[np.arange(len(truth)), predicted] for t in (temperature, 1.0))
    ranks = ranks_of(logits, truth) if ranks is None else ranks
    return Predictions(names, truth, predicted, confidence, plain, ranks)


def joined(parts: Sequence[Predictions]) -> Predictions:
    """Join predictions for several groups of images into one."""
    arrays = (
        np.concatenate([getattr(part, key) for part in parts])
        for key in ("truth", "predicted", "confidence", "uncalibrated", "ranks")
    )
    return Predictions([name for part in parts for name in part.names], *arrays)


def check_predictions_file(path: Path) -> None:
    """Check that a file of predictions would replace no other file.

    Raises:
        DinoError: If the path is a file without the columns of predictions.
    """
    if path.is_file() and first_line(path).strip() != ",".join(_COLUMNS).encode():
        raise DinoError(
            f"{path} exists and holds no predictions; it would be overwritten",
            f"name a new file, such as {path.with_name(f'{path.stem}-predictions.csv')}",
        )


def write_predictions(path: Path, predictions: Predictions, classes: Sequence[str]) -> None:
    """Write a CSV file with one row per image: its name, class, predicted class and confidence from 0 to 1."""
    named = [[classes[label] for label in labels.tolist()] for labels in (predictions.truth, predictions.predicted)]
    confidences = [f"{confidence:.6f}" for confidence in predictions.confidence.tolist()]
    write_table(path, _COLUMNS, zip(predictions.names, *named, confidences, strict=True))
