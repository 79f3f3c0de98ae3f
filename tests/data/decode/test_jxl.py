"""JPEG XL: turned exactly once, whichever place states the orientation, and at full depth."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinocli.data.decode.image import decode, open_image
from dinocli.data.decode.jxl import read_header
from dinocli.data.decode.pixels import BadImage
from dinocli.data.images import ImagesConfig

codecs: Any = pytest.importorskip("imagecodecs")
if not codecs.JPEGXL.available:
    pytest.skip("this imagecodecs has no libjxl", allow_module_level=True)

UPRIGHT = np.zeros((64, 96, 3), np.uint8)
UPRIGHT[:, :48], UPRIGHT[:, 48:], UPRIGHT[:32, :48] = (200, 0, 0), (0, 0, 200), (0, 200, 0)
ON_ITS_SIDE = np.ascontiguousarray(np.rot90(UPRIGHT))


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


def lossless(values: Any) -> bytes:
    return bytes(codecs.jpegxl_encode(values, lossless=True))


@pytest.mark.parametrize("size", [(64, 96), (63, 97), (8, 2000), (300, 300), (90, 160), (513, 17)])
def test_size_and_orientation_come_from_the_first_bits(size: tuple[int, int]) -> None:
    assert read_header(lossless(np.zeros(size, np.uint8))) == (size[1], size[0], 1)
    deep = lossless(np.zeros((*size, 3), np.uint16))
    assert deep.startswith(b"\0\0\0\x0cJXL ") and read_header(deep) == (size[1], size[0], 1), "in a container"


def test_an_orientation_in_the_code_stream_is_applied_once() -> None:
    file = io.BytesIO()
    Image.fromarray(ON_ITS_SIDE).save(file, "JPEG", quality=95, subsampling=0, exif=exif(6))
    data = bytes(codecs.jpegxl_encode_jpeg(file.getvalue()))  # as `cjxl photo.jpg`; keeps Exif and says it twice
    assert read_header(data) == (64, 96, 6)
    opened = open_image(data)
    assert not isinstance(opened, BadImage) and (opened.height, opened.width) == (64, 96)
    found = opened.pixels()
    assert isinstance(found, np.ndarray) and np.abs(found.astype(int) - UPRIGHT).max() <= 4, "the loss of the JPEG"


def test_an_orientation_in_exif_alone_is_applied() -> None:
    content = b"\0\0\0\0" + exif(6).removeprefix(b"Exif\0\0")
    box = (8 + len(content)).to_bytes(4) + b"Exif" + content
    stream = lossless(ON_ITS_SIDE)
    boxes = b"\0\0\0\x0cJXL \r\n\x87\n\0\0\0\x14ftypjxl \0\0\0\0jxl " + box
    data = boxes + (8 + len(stream)).to_bytes(4) + b"jxlc" + stream
    np.testing.assert_array_equal(decode(data), UPRIGHT)


def test_sixteen_bits_and_floats_keep_their_values() -> None:
    values = (np.arange(32 * 32 * 3) * 21).astype(np.uint16).reshape(32, 32, 3)
    window = ImagesConfig(window=(0, 20000))
    np.testing.assert_array_equal(
        decode(lossless(values), window), (np.clip(values / 20000, 0, 1) * 255 + 0.5).astype(int)
    )
    floats = np.linspace(0, 1, 1024, dtype=np.float32).reshape(32, 32)
    np.testing.assert_array_equal(decode(lossless(floats)), np.dstack([(floats * 255 + 0.5).astype(int)] * 3))


def test_the_limits_hold_before_anything_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = lossless(UPRIGHT)
    monkeypatch.setattr(codecs, "jpegxl_decode", None)
    found = decode(data, ImagesConfig(max_megapixels=0.001))
    assert isinstance(found, BadImage) and found.reason.startswith("too large: 96x64 pixels")


@pytest.mark.parametrize("size", [2, 12, 40, 100])
def test_a_file_that_is_cut_short_is_a_reason(size: int) -> None:
    data = lossless(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    assert isinstance(decode(data[:size]), BadImage)


def test_an_animation_gives_its_first_frame() -> None:
    frames = np.stack([np.full((16, 16, 3), level, np.uint8) for level in (10, 200)])
    np.testing.assert_array_equal(decode(lossless(frames)), frames[0])
