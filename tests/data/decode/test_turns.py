"""The eight orientations, against the position of every pixel under a display matrix."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from dinocli.data.decode.turns import orientation_of, turned

# a, b, c, d of each: the point (x, y) is shown at (ax + cy, bx + dy).
MATRICES = {
    1: (1, 0, 0, 1),
    2: (-1, 0, 0, 1),
    3: (-1, 0, 0, -1),
    4: (1, 0, 0, -1),
    5: (0, 1, 1, 0),
    6: (0, 1, -1, 0),
    7: (0, -1, -1, 0),
    8: (0, -1, 1, 0),
}


def nine(a: float, b: float, c: float, d: float, scale: int = 65536) -> list[int]:
    return [round(scale * a), round(scale * b), 0, round(scale * c), round(scale * d), 0, 640 << 16, 0, 1 << 30]


@pytest.mark.parametrize("orientation", MATRICES)
@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4)])
def test_every_pixel_moves_as_the_matrix_states(orientation: int, shape: tuple[int, ...]) -> None:
    a, b, c, d = MATRICES[orientation]
    pixels = np.arange(np.prod(shape)).reshape(shape)
    places = [(a * x + c * y, b * x + d * y) for y in range(2) for x in range(3)]
    left, top = min(x for x, _ in places), min(y for _, y in places)
    height, width = (2, 3) if a else (3, 2)
    wanted = np.zeros((height, width, *shape[2:]), pixels.dtype)
    for (x, y), value in zip(places, pixels.reshape(6, *shape[2:]), strict=True):
        wanted[y - top, x - left] = value
    found = turned(pixels, orientation_of(nine(a, b, c, d)))
    np.testing.assert_array_equal(found, wanted)
    assert found.flags["C_CONTIGUOUS"]


@pytest.mark.parametrize("orientation", MATRICES)
def test_numbers_agree_with_exif(orientation: int) -> None:
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(file, "PNG", exif=exif)
    np.testing.assert_array_equal(turned(pixels, orientation), ImageOps.exif_transpose(Image.open(file)))
    assert orientation_of(nine(*MATRICES[orientation])) == orientation


def test_scale_is_ignored_and_rotations_are_rounded_to_quarter_turns() -> None:
    for orientation, matrix in MATRICES.items():
        assert orientation_of(nine(*matrix, scale=7)) == orientation
    for degrees, orientation in ((10, 1), (80, 6), (100, 6), (170, 3), (260, 8), (350, 1)):
        cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        assert orientation_of(nine(cos, sin, -sin, cos)) == orientation, degrees
    assert orientation_of([0] * 9) == 1, "a zero matrix changes nothing"
    assert turned(np.eye(2), 9) is not None
