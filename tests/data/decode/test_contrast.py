"""Contrast, and raw ranges measured by decoding, against known values."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from dinocli.data.decode.contrast import contrast, raw_range
from dinocli.data.decode.image import decode
from dinocli.data.images import DEFAULTS, ImagesConfig

RANDOM = np.random.default_rng(0)
SHAPE = (80, 90)


def file(values: np.ndarray, kind: type = np.uint16, form: str = "PNG") -> bytes:
    made = io.BytesIO()
    if form == "NPY":
        np.save(made, np.repeat(values.astype(kind)[..., None], 3, axis=2))
    else:
        Image.fromarray(values.astype(kind)).save(made, form)
    return made.getvalue()


def test_contrast_measures_the_levels() -> None:
    assert contrast(np.full((9, 9, 3), 7, np.uint8)) == (7, 7, True, True)
    red = np.zeros((9, 9, 3), np.uint8)
    red[..., 0] = 255
    assert contrast(red).single and not contrast(red).narrow
    levels = RANDOM.integers(10, 14, (99, 99, 1), dtype=np.uint8)
    assert contrast(levels) == (10, 13, False, True) and contrast(levels).narrow
    levels[50, 50] = 255
    assert contrast(levels) == (10, 13, False, True), "one pixel is an outlier"
    wide = RANDOM.integers(0, 256, (99, 99, 3), dtype=np.uint8)
    assert contrast(wide) == (0, 255, False, False)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "NPY"])
@pytest.mark.parametrize(("low", "high"), [(0, 100), (5, 6), (0, 1000), (300, 4095), (30000, 30200), (65400, 65535)])
def test_raw_values_are_measured_in_the_units_of_a_window(form: str, low: int, high: int) -> None:
    values = RANDOM.integers(low, high + 1, SHAPE)
    values[0, :60], values[1, :60] = low, high  # more than outliers
    found = raw_range(file(values, form=form), DEFAULTS)
    assert found is not None
    # Each end is known to half a step; the last window has 255 steps.
    np.testing.assert_allclose(found, (low, high), atol=max(0.01, (high - low) / 255))
    pixels = decode(file(values, form=form), ImagesConfig(window=found))
    assert (pixels.min(), pixels.max()) == (0, 255), "the window spans all values"
    assert raw_range(file(values, form=form), ImagesConfig(window=(0, 10))) == found, (
        "the window of the settings is ignored"
    )


def test_hot_pixels_do_not_hide_the_others() -> None:
    values = RANDOM.integers(0, 101, SHAPE)
    values[7, 7] = 65535
    assert raw_range(file(values), DEFAULTS) == (0, 100)


def test_images_that_a_window_cannot_improve_have_no_range() -> None:
    for level in (0, 7, 65535):
        assert raw_range(file(np.full(SHAPE, level)), DEFAULTS) is None, "one raw value"
    assert raw_range(file(RANDOM.integers(0, 65536, SHAPE)), DEFAULTS) is None, "all of 16 bits"
    assert raw_range(b"no image", DEFAULTS) is None
    for low, high in ((0, 1), (128, 129), (255, 256), (10, 14), (126, 130), (0, 60)):
        values = RANDOM.integers(low, high, SHAPE)
        assert raw_range(file(values, np.uint8), DEFAULTS) is None, f"8 bits, {low} to {high}"
