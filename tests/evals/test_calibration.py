from __future__ import annotations

import numpy as np
import pytest

from dinocli.evals.calibration import expected_calibration_error, fit_temperature, softmax


def sampled(images: int, temperature: float, classes: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return logits, and classes drawn with the probabilities of these logits at a temperature."""
    generator = np.random.default_rng(seed)
    logits = 3 * generator.normal(size=(images, classes))
    chances = softmax(logits, temperature).cumsum(1)
    return logits, (generator.random((images, 1)) > chances).sum(1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_that_drew_the_classes_is_found(temperature: float) -> None:
    logits, truth = sampled(20_000, temperature)
    assert fit_temperature(logits, truth) == pytest.approx(temperature, rel=0.05)


def test_the_fitted_temperature_lowers_the_calibration_error() -> None:
    logits, truth = sampled(20_000, 3.0)
    correct, fitted = logits.argmax(1) == truth, fit_temperature(*sampled(2000, 3.0, seed=1))
    before, after = (expected_calibration_error(softmax(logits, t).max(1), correct) for t in (1.0, fitted))
    assert before > 10
    assert after < 2


def test_a_few_correct_images_give_no_certainty() -> None:
    logits = np.array([[4.0, 0, 0], [0, 4, 0], [0, 0, 4]])
    truth = np.arange(3)
    assert fit_temperature(logits, truth) == pytest.approx(1)
    truth[0] = 1
    # With one of three wrong, the best probability of the predicted class is 2/3.
    assert softmax(logits, fit_temperature(logits, truth)).max(1) == pytest.approx([2 / 3] * 3, rel=1e-6)
    with pytest.raises(ValueError, match="no images"):
        fit_temperature(logits[:0], truth[:0])


def test_logits_without_information_flatten_the_probabilities() -> None:
    generator = np.random.default_rng(0)
    logits, truth = generator.normal(size=(5000, 4)), generator.integers(4, size=5000)
    assert softmax(logits, fit_temperature(logits, truth)).max() < 0.35


def test_the_error_is_the_distance_of_confidence_and_accuracy_in_each_bin() -> None:
    confidence, correct = np.array([0.9, 0.9, 0.9, 0.9, 0.5, 0.5]), np.array([1, 1, 1, 0, 0, 0], dtype=bool)
    # Two bins: four images of 0.9 with an accuracy of 0.75, two of 0.5 with 0.
    assert expected_calibration_error(confidence, correct) == pytest.approx(100 * (4 * 0.15 + 2 * 0.5) / 6)
    assert expected_calibration_error(np.ones(3), np.ones(3, dtype=bool)) == 0


def test_softmax_is_finite_for_large_logits() -> None:
    assert softmax(np.array([[1e4, 0.0]], np.float32)).tolist() == [[1, 0]]
