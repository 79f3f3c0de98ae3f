"""Contrast of images after conversion to 8 bits, and raw value ranges of deep images that lose contrast."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dinocli.data.decode.image import decode
from dinocli.data.decode.pixels import BadImage, Data, Pixels
from dinocli.data.images import ImagesConfig, Range

_DEEPEST = 65535.0  # largest value of 16 bits; deeper images and floats are already scaled by their values
_TAIL = 0.001  # share of the pixels at either end; they are outliers if they more than double the range
_FAINT = 2.0  # levels of standard deviation, below which nothing is visible
_NARROW = 64  # levels, a quarter of 8 bits
_ROUNDS = 5


class Contrast(NamedTuple):
    """Levels of an image in 8 bits.

    Attributes:
        low: Lowest level, without outliers.
        high: Highest level, without outliers.
        single: True if all pixels are equal.
        faint: True if the standard deviation without outliers is below two levels.
    """

    low: int
    high: int
    single: bool
    faint: bool

    @property
    def narrow(self) -> bool:
        """True if the levels span less than a quarter of 8 bits."""
        return self.high - self.low < _NARROW


def contrast(pixels: Pixels) -> Contrast:
    """Measure the contrast of pixels. [H, W, C]"""
    counts = np.bincount(pixels.ravel(), minlength=256)
    low, high = _ends(counts, trim=False)
    levels = np.arange(256).clip(low, high)
    mean = np.average(levels, weights=counts)
    single = bool((pixels == pixels[:1, :1]).all())  # a red image has two levels and one color
    return Contrast(low, high, single, bool(np.average((levels - mean) ** 2, weights=counts) < _FAINT**2))


def raw_range(data: Data, images: ImagesConfig) -> Range | None:
    """Measure the raw value range of a 16-bit image, in the units of `images.window`, which itself is ignored.

    The image is decoded several times, each time with a window around the values found before. So this works for
    every format that supports a window, and detects images that ignore it.

    Returns:
        Lowest and highest value, without outliers. None if all values are equal or fill 16 bits, if the image has 8
        bits, or if it cannot be read.
    """
    low, high, trim = 0.0, _DEEPEST, False
    wanted: list[tuple[float, float]] = []
    for _ in range(_ROUNDS):
        counts = _counts(data, images, low, high)
        if counts is None:
            return None
        found = _ends(counts, trim=trim)
        trim = trim or found != _ends(counts, trim=False, whole=True)
        if not all(least <= level <= most for level, (least, most) in zip(found, wanted, strict=False)):
            return None  # the window made no difference
        step = (high - low) / 255
        ends = [low + level * step for level in found]
        next_low, next_high = ends[0] - step, ends[1] + step
        if next_high - next_low > 0.7 * (high - low):
            break
        # Levels are rounded, so either end is known to half a step.
        half, finer = step / 2, (next_high - next_low) / 255
        wanted = [((end - half - next_low) / finer - 1, (end + half - next_low) / finer + 1) for end in ends]
        low, high = next_low, next_high
    if not wanted:
        return None
    for side, end in enumerate(ends if step > 0.5 else ()):  # refine to whole numbers
        counts = _counts(data, images, end - 2 * step, end + 2 * step)
        if counts is None:
            return None
        ends[side] = end - 2 * step + _ends(counts, trim=trim, whole=not trim)[side] * 4 * step / 255
    least, most = (float(np.clip(round(end), 0, _DEEPEST)) for end in ends)
    return (least, most) if least < most else None


def _counts(data: Data, images: ImagesConfig, low: float, high: float) -> NDArray[np.int64] | None:
    """Count the pixels per level under a window. [256]"""
    pixels = decode(data, images.model_copy(update={"window": (low, high)}))
    return None if isinstance(pixels, BadImage) else np.bincount(pixels.ravel(), minlength=256)


def _ends(counts: NDArray[np.int64], *, trim: bool, whole: bool = False) -> tuple[int, int]:
    """Return the lowest and highest level, with or without tails of a thousandth of the pixels at either end.

    Args:
        counts: Number of pixels per level. [256]
        trim: Always drop the tails. If False, drop them only if they more than double the range.
        whole: Always keep the tails.
    """
    there = np.flatnonzero(counts)
    first, last = int(there[0]), int(there[-1])
    if whole:
        return first, last
    total = counts.sum()
    below = counts.cumsum()
    inner_first = int(np.searchsorted(below, _TAIL * total, side="right"))
    inner_last = int(np.searchsorted(below, (1 - _TAIL) * total))
    if trim or last - first > 2 * (inner_last - inner_first) + 1:
        return inner_first, inner_last
    return first, last
