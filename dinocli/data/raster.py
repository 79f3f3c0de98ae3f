"""Files whose raw values are read here and not by Pillow: the header that was read, and the reason to refuse one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinocli.data.depth import Layout

MISSING = "needs pip install 'dinocli[tiff]'"


class UnfitArray(Exception):
    """An array that is no image as it was wanted; a category to count by, a colon, a few words."""


@dataclass(frozen=True)
class ArrayFile:
    """A file of which only the header was read.

    Attributes:
        format: As Pillow names it, or `NPY`.
        height: In pixels, as stored.
        width: In pixels, as stored.
        bands: Number of bands in the file.
        dtype: Type of its values.
        layout: Meaning of its bands.
        read: Function that reads the values. [H, W, bands]
        turn: EXIF orientation that the pixels still need.
        pages: Number of pictures in the file, of which this is the first.
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
    """Return the reason to refuse a file of another number of channels."""
    return f"other channels: {came}, where images.channels is {wanted}"
