"""Calibration: a temperature that makes confidences match accuracies, and the error that remains."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
FEW = 100  # images: a temperature fitted on fewer is a rough guess
CALIBRATED = 10_000  # images to fit one number on; more change nothing and take memory
_SHARPEST, _FLATTEST = 0.01, 100.0  # range of temperatures
_HALVINGS = 50  # of that range, in logarithms: beyond the digits of a float32
_BINS = 15


@dataclass(frozen=True)
class Calibration:
    """Temperature of a classifier, and its effect on the test images.

    Attributes:
        temperature: Divisor of the logits before the softmax.
        images: Number of images it was fitted on.
        fitted_on: Images it was fitted on, in words.
        before: Expected calibration error of the test images at a temperature of 1, in percent.
        after: Expected calibration error of the test images at this temperature, in percent.
    """

    temperature: float
    images: int
    fitted_on: str
    before: float
    after: float


def softmax(logits: NDArray[np.floating], temperature: float = 1.0) -> Floats:
    """Return class probabilities. [Q, K] -> [Q, K]"""
    scaled = np.asarray(logits, np.float64) / temperature
    weights = np.exp(scaled - scaled.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


def sigmoid(logits: NDArray[np.floating], temperature: float = 1.0) -> Floats:
    """Return the probability of each class on its own. [Q, K] -> [Q, K]"""
    scaled = np.asarray(logits, np.float64) / temperature
    return 0.5 * (1 + np.tanh(scaled / 2))  # never overflows


def fit_temperature(logits: NDArray[np.floating], truth: NDArray[np.int64]) -> float:
    """Fit the temperature that minimizes the cross-entropy of held-out images.

    It is not below 1 if all images are correct: any lower temperature would then fit better, down to a confidence of
    100 % from a few images.

    Args:
        logits: Logits of images that did not train the classifier. [N, K]
        truth: Class of each image. [N]

    Raises:
        ValueError: If there are no images.

    Source: temperature scaling, Guo et al. 2017, arXiv 1706.04599.
    """
    if not len(logits):
        raise ValueError("no images to fit a temperature on")
    logits = np.asarray(logits, np.float64)
    own = logits[np.arange(len(logits)), truth].mean()
    sharpest = 1.0 if (logits.argmax(1) == truth).all() else _SHARPEST
    # The loss is convex in 1 / temperature; its slope there is the mean expected logit minus the mean true logit.
    sharp, flat = np.log(sharpest), np.log(_FLATTEST)
    for _ in range(_HALVINGS):
        middle = (sharp + flat) / 2
        expected = (softmax(logits, float(np.exp(middle))) * logits).sum(1).mean()
        if expected > own:  # too sure
            sharp = middle
        else:
            flat = middle
    return float(np.exp((sharp + flat) / 2))


def expected_calibration_error(confidence: NDArray[np.floating], correct: NDArray[np.bool_]) -> float:
    """Return the mean distance between confidence and accuracy over 15 bins of confidence, in percent.

    Args:
        confidence: Probability of each image's predicted class. [Q]
        correct: True for each image whose predicted class is its class. [Q]

    Source: Guo et al. 2017, arXiv 1706.04599, equation 3.
    """
    bins = np.minimum((confidence * _BINS).astype(np.int64), _BINS - 1)
    sure, right = (np.bincount(bins, weights, _BINS) for weights in (confidence, correct))
    return float(100 * np.abs(sure - right).sum() / len(confidence))
