"""Headers of files whose raw values are read without Pillow, and the error for those that do not fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinocli.data.decode.bit_depth import Alpha, Layout

MISSING = "needs pip install 'dinocli[tiff]'"


class UnfitArray(Exception):
    """Error for an array that does not fit the `[images]` settings. Its text is a reason, as in `BadImage`."""


@dataclass(frozen=True)
class ArrayFile:
    """Array file after reading only its header.

    Attributes:
        format: Pillow's name of the format, or `NPY`.
        height: Height in pixels, as stored.
        width: Width in pixels, as stored.
        layout: Meaning of the bands.
        read: Function that reads the values. [H, W, bands]
        turn: EXIF orientation that is not applied yet.
        pages: Number of pictures in the file. Only the first is read.
    """

    format: str
    height: int
    width: int
    bands: int
    dtype: np.dtype[Any]
    layout: Layout
    read: Callable[[], NDArray[Any]]
    turn: int = 1
    pages: int = 1


def other_channels(came: str, wanted: int) -> str:
    """Return the reason to refuse a file with another number of channels."""
    return f"other channels: {came}; expected {wanted} (images.channels)"


def picture_layout(
    format: str, bands: int, range: tuple[float, float] | None, channels: int, alpha: Alpha = "straight"
) -> Layout:
    """Return the layout of a picture with 1 to 4 bands: grey or colors, and alpha as the last of two or four.

    Raises:
        UnfitArray: If `channels` is neither 1 nor 3 and differs from the number of bands.
    """
    if channels in (1, 3):
        return Layout("gray" if bands < 3 else "rgb", range, "" if bands % 2 else alpha)
    if bands != channels:
        raise UnfitArray(other_channels(f"{bands} ({format})", channels))
    return Layout("bands", range)
