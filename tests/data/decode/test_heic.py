"""HEIC photos, and AVIF beside them: turned exactly once, at full depth, from the primary picture."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, features

from dinocli.data.decode.image import decode, open_image
from dinocli.data.decode.pixels import BadImage
from dinocli.data.images import ImagesConfig

UPRIGHT = np.zeros((64, 96, 3), np.uint8)
UPRIGHT[:, :48], UPRIGHT[:, 48:], UPRIGHT[:32, :48] = (200, 0, 0), (0, 0, 200), (0, 200, 0)


def turned_file(format: str, **options: Any) -> bytes:
    """Return a file of UPRIGHT as a phone stores it: lying on its side, with orientation 6."""
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.fromarray(np.ascontiguousarray(np.rot90(UPRIGHT))).save(file, format, exif=exif.tobytes(), **options)
    return file.getvalue()


def heic(values: NDArray[Any], mode: str, **options: Any) -> bytes:
    heif = pytest.importorskip("pillow_heif")
    file = io.BytesIO()
    heif.from_bytes(mode, values.shape[1::-1], values.tobytes()).save(file, quality=-1, **options)
    return file.getvalue()


def near(found: object, expected: NDArray[Any], most: int) -> bool:
    assert isinstance(found, np.ndarray) and found.shape == expected.shape, found
    return bool(np.abs(found.astype(int) - expected).max() <= most)


def test_a_heic_photo_is_turned_once() -> None:
    pytest.importorskip("pillow_heif").register_heif_opener()
    opened = open_image(turned_file("HEIF", quality=-1))
    assert not isinstance(opened, BadImage) and (opened.height, opened.width) == (64, 96)
    assert near(opened.pixels(), UPRIGHT, 2), "2 levels: from RGB to YCbCr and back"


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_an_avif_photo_is_turned_once() -> None:
    found = decode(turned_file("AVIF", quality=100, subsampling="4:4:4"))
    assert near(found, UPRIGHT, 4), "4 levels: from RGB to YCbCr and back"


def test_ten_bits_keep_their_values() -> None:
    values = (np.arange(64 * 96 * 3) * 7 % 1024).astype(np.uint16).reshape(64, 96, 3)
    data = heic(values << 6, "RGB;16", chroma=444, matrix_coefficients=0)  # pillow-heif takes the upper bits
    found = decode(data, ImagesConfig(window=(0, 511)))
    assert near(found, np.clip(values / 511 * 255, 0, 255).round(), 1), "a window is in the file's own values"
    assert near(decode(data), (values / 1023 * 255).round(), 1)


def test_the_primary_picture_is_read() -> None:
    heif = pytest.importorskip("pillow_heif")
    file, several = io.BytesIO(), heif.HeifFile()
    for level in (10, 100, 200):
        several.add_frombytes("RGB", (32, 32), bytes([level]) * 3072)
    several.save(file, primary_index=2, quality=-1)
    opened = open_image(file.getvalue())
    assert not isinstance(opened, BadImage) and opened.pages == 3
    assert near(opened.pixels(), np.full((32, 32, 3), 200), 1)


def test_alpha_and_grey_become_the_channels_of_the_preset() -> None:
    grey = np.arange(1024, dtype=np.uint8).reshape(32, 32)
    assert near(decode(heic(grey, "L")), np.dstack([grey] * 3), 1)
    assert near(decode(heic(grey, "L"), ImagesConfig(channels=1)), grey[..., None], 1)
    clear = np.dstack([grey] * 3 + [np.full_like(grey, 128)])
    assert near(decode(heic(clear, "RGBA")), np.dstack([(grey * (128 / 255) + 127).round()] * 3), 2), "on white"
    assert decode(heic(clear, "RGBA"), ImagesConfig(channels=5)) == BadImage(
        "other channels: 4 (HEIC); expected 5 (images.channels)"
    )


def test_a_heic_that_is_cut_short_or_too_large_is_refused() -> None:
    data = heic(UPRIGHT, "RGB")
    short = decode(data[:-100])
    assert isinstance(short, BadImage) and short.reason.startswith("truncated: ")
    large = decode(data, ImagesConfig(max_megapixels=0.001))
    assert isinstance(large, BadImage) and large.reason.startswith("too large: 96x64 pixels")
