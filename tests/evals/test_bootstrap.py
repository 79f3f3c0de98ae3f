from __future__ import annotations

import numpy as np
import pytest

from dinocli.evals.bootstrap import paired_difference


def answers(both: int, first: int, second: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the answers of two networks, by the number of images that both, one or neither classify correctly."""
    counts = (both, first, second, neither)
    return (np.repeat([True, True, False, False], counts), np.repeat([True, False, True, False], counts))


def test_the_interval_is_that_of_the_normal_approximation() -> None:
    before, after = answers(500, 60, 140, 300)
    found = paired_difference(before, after)
    change = after.astype(float) - before.astype(float)
    error = 100 * 1.96 * change.std() / len(change) ** 0.5
    assert (found.before, found.after, found.mean) == pytest.approx((56.0, 64.0, 8.0))
    assert (found.low, found.high) == pytest.approx((8.0 - error, 8.0 + error), abs=0.25)


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [(10, 60, "better"), (60, 10, "worse"), (30, 36, "no difference"), (0, 0, "no difference")],
)
def test_the_verdict_needs_an_interval_without_0(first: int, second: int, verdict: str) -> None:
    assert paired_difference(*answers(400, first, second, 100)).verdict == verdict


def test_images_on_which_both_agree_narrow_the_interval() -> None:
    few = paired_difference(*answers(450, 0, 20, 30))
    many = paired_difference(*answers(300, 150, 170, 0))
    assert few.high - few.low < (many.high - many.low) / 3


def test_the_interval_covers_the_true_difference_in_95_of_100_samples() -> None:
    generator, covered = np.random.default_rng(0), 0
    for seed in range(200):
        before = generator.random(300) < 0.6
        flips = generator.random(300)
        after = np.where(flips < 0.1, generator.random(300) < 0.8, before)  # expected difference: 0.1 * (0.8 - 0.6)
        found = paired_difference(before, after, draws=1000, seed=seed)
        covered += found.low <= 2.0 <= found.high
    assert 180 <= covered <= 199


def test_different_numbers_of_answers_are_refused() -> None:
    with pytest.raises(ValueError, match="2 and 1 answers"):
        paired_difference(np.array([True, False]), np.array([True]))


def test_a_handful_of_changed_images_decides_nothing() -> None:
    assert paired_difference(*answers(0, 0, 5, 0)).verdict == "no difference"
    assert paired_difference(*answers(0, 0, 6, 0)).verdict == "better"
    assert paired_difference(*answers(0, 6, 0, 0)).verdict == "worse"
