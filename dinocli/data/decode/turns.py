"""Rotations and flips of a picture, numbered as the eight EXIF orientations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

TURNS: dict[int, Callable[[NDArray[Any]], NDArray[Any]]] = {
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.swapaxes(0, 1),
    6: lambda p: np.rot90(p, -1),
    7: lambda p: p[::-1, ::-1].swapaxes(0, 1),
    8: np.rot90,
}
# A display matrix moves the point (x, y), y downwards, to (ax + cy, bx + dy). Signs of a, b, c, d by orientation.
_SIGNS = {
    (1, 0, 0, 1): 1,
    (-1, 0, 0, 1): 2,
    (-1, 0, 0, -1): 3,
    (1, 0, 0, -1): 4,
    (0, 1, 1, 0): 5,
    (0, 1, -1, 0): 6,
    (0, -1, -1, 0): 7,
    (0, -1, 1, 0): 8,
}


def turned(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Return pixels upright, contiguous in memory. [H, W, ...]

    Args:
        pixels: Pixels before rotation. [H, W, C]
        orientation: EXIF orientation, 1 to 8. Any other number changes nothing.
    """
    return np.ascontiguousarray(TURNS[orientation](pixels)) if orientation in TURNS else pixels


def orientation_of(matrix: ArrayLike) -> int:
    """Return the EXIF orientation nearest to the display matrix of a video.

    Args:
        matrix: Nine numbers in rows, a b u, c d v, x y w. Scale and shift are ignored.

    Source: ISO/IEC 14496-12, section 6.2.2.
    """
    a, b, _, c, d = np.asarray(matrix, dtype=np.float64).ravel()[:5].tolist()
    # Other rotations are rounded to the nearest quarter turn.
    straight = abs(a) + abs(d) >= abs(b) + abs(c)
    a, b, c, d = (a, 0, 0, d) if straight else (0, b, c, 0)
    return _SIGNS.get((_sign(a), _sign(b), _sign(c), _sign(d)), 1)


def _sign(number: float) -> int:
    return (number > 0) - (number < 0)
