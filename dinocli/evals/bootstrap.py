"""Paired bootstrap: the difference of two networks on the same images, with a confidence interval."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Verdict = Literal["better", "no difference", "worse"]
# Five changes of one sign happen by chance (1 in 16 by the sign test), and the bootstrap would call them certain.
_FEWEST_CHANGED = 6
_CELLS = 2**22  # drawn images per block of draws


@dataclass(frozen=True)
class Difference:
    """Difference of two accuracies on the same images, in percentage points.

    Attributes:
        before: First accuracy, in percent.
        after: Second accuracy, in percent.
        low: Lower end of the 95 % interval of the difference.
        high: Upper end of the 95 % interval of the difference.
        changed: Number of images with another answer.
    """

    before: float
    after: float
    low: float
    high: float
    changed: int

    @property
    def mean(self) -> float:
        """Second accuracy minus the first."""
        return self.after - self.before

    @property
    def verdict(self) -> Verdict:
        """`better` or `worse` if the interval excludes 0 and enough images changed, else `no difference`."""
        if self.changed < _FEWEST_CHANGED:
            return "no difference"
        return "better" if self.low > 0 else "worse" if self.high < 0 else "no difference"


def paired_difference(
    before: NDArray[np.bool_], after: NDArray[np.bool_], draws: int = 10_000, seed: int = 0
) -> Difference:
    """Estimate how a difference in accuracy varies over samples of images.

    Each draw samples as many images as there are, with replacement, and keeps both answers of an image together. So
    the interval is much narrower than from the two accuracies alone if the networks agree on most images.

    Args:
        before: True for each image that the first network classifies correctly. [S]
        after: The same for the second network. [S]
        draws: Number of samples.
        seed: Seed of the resampled images.

    Raises:
        ValueError: If there are no images, or not the same number of both.

    Source: Efron and Tibshirani 1993, percentile interval.
    """
    if not len(before) or len(before) != len(after):
        raise ValueError(f"{len(before)} and {len(after)} answers; expected the same number, at least one")
    change = after.astype(np.int8) - before.astype(np.int8)
    generator, means = np.random.default_rng(seed), np.empty(draws)
    at_once = max(1, _CELLS // len(change))
    for first in range(0, draws, at_once):
        count = min(at_once, draws - first)
        rows = generator.integers(len(change), size=(count, len(change)))
        means[first : first + count] = change[rows].mean(1)
    low, high = 100 * np.quantile(means, (0.025, 0.975))
    return Difference(
        100 * float(before.mean()), 100 * float(after.mean()), float(low), float(high), int(np.count_nonzero(change))
    )
