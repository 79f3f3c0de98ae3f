from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from dinocli.data.decode.bit_depth import Layout, depth_range, image_layout, image_values, to_bytes, usual_range


def deep_to_gray(image: Image.Image, window: tuple[float, float] | None) -> np.ndarray | None:
    windows = None if window is None else np.array([window])
    pixels = to_bytes(image_values(image), image_layout(image), 1, windows)
    return None if pixels is None else pixels[..., 0]


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


def test_a_file_that_states_12_bits_is_scaled_by_12_bits() -> None:
    assert deep_to_gray(tiff(ramp(4095, np.uint16), _281=4095), None)[-1, -1] == 255


def test_nan_is_ignored_and_all_nan_is_refused() -> None:
    values = ramp(1, np.float32)
    values[0, :3] = (np.nan, np.inf, -np.inf)
    gray = deep_to_gray(Image.fromarray(values), None)
    assert gray[-1, -1] == 255
    assert 100 < gray[4, 0] < 160
    assert deep_to_gray(Image.fromarray(np.full((4, 4), np.nan, dtype=np.float32)), None) is None


def test_depth_follows_the_stated_bits_or_largest_value() -> None:
    assert depth_range(12) == (0, 4095)
    assert depth_range(16, 3900) == (0, 4095)
    assert depth_range(16, 200) == (0, 255)
    assert usual_range(np.full((2, 2, 1), np.nan)) is None
    assert usual_range(np.int16([[[-9000], [900]]])) == (-32768, 32768)


def test_values_above_the_stated_depth_correct_it_only_if_it_is_guessed() -> None:
    values = np.uint16([[[0], [300], [65535]]])
    assert to_bytes(values, Layout("gray", (0, 255), guessed=True), 1)[0, :, 0].tolist() == [0, 1, 255]
    assert to_bytes(values, Layout("gray", (0, 255)), 1)[0, :, 0].tolist() == [0, 255, 255]


def test_a_narrow_window_of_large_integers_keeps_its_steps() -> None:
    values = np.uint32(4e9 + np.arange(256))[None, :, None]
    assert to_bytes(values, Layout("gray"), 1, np.array([[4e9, 4e9 + 255]]))[0, :, 0].tolist() == list(range(256))


def test_large_images_are_converted_in_blocks_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (50, 20, 4), dtype=np.uint16)
    layout = Layout("rgb", (0, 65535), alpha="straight")
    whole = to_bytes(values, layout, 3)
    monkeypatch.setattr("dinocli.data.decode.bit_depth._BLOCK", 200)
    assert np.array_equal(to_bytes(values, layout, 3), whole)
