from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from dinocli.data.depth import deep_to_gray


def tiff(values: np.ndarray, **tags: int) -> Image.Image:
    file = io.BytesIO()
    Image.fromarray(values).save(file, "TIFF", tiffinfo={int(key[1:]): value for key, value in tags.items()})
    return Image.open(io.BytesIO(file.getvalue()))


def ramp(top: float, dtype: type) -> np.ndarray:
    return np.linspace(0, top, 64).reshape(8, 8).astype(dtype)


@pytest.mark.parametrize(
    ("values", "window", "first", "last"),
    [
        (ramp(65535, np.uint16), None, 0, 255),
        (ramp(65535, np.uint16), (0, 131070), 0, 128),
        (ramp(1, np.float32), None, 0, 255),
        (ramp(255, np.float32), None, 0, 255),
        (ramp(2**31 - 1, np.int32), None, 0, 128),
        (ramp(2, np.float32) - 1, None, 0, 255),
        (ramp(4000, np.float32), (1000, 2000), 0, 255),
    ],
)
def test_values_are_scaled_by_depth_range_or_window(values, window, first: int, last: int) -> None:
    gray = deep_to_gray(Image.fromarray(values), window)
    assert (gray[0, 0], gray[-1, -1]) == pytest.approx((first, last), abs=1)
    assert (np.diff(gray.ravel().astype(int)) >= 0).all()


def test_a_file_that_states_twelve_bits_is_scaled_by_twelve() -> None:
    assert deep_to_gray(tiff(ramp(4095, np.uint16), _281=4095), None)[-1, -1] == 255


def test_what_is_no_number_is_passed_over_and_nothing_but_that_is_refused() -> None:
    values = ramp(1, np.float32)
    values[0, :3] = (np.nan, np.inf, -np.inf)
    gray = deep_to_gray(Image.fromarray(values), None)
    assert gray[-1, -1] == 255
    assert 100 < gray[4, 0] < 160
    assert deep_to_gray(Image.fromarray(np.full((4, 4), np.nan, dtype=np.float32)), None) is None
