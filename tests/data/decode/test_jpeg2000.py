"""JPEG 2000: every depth and window against computed values, and limits of memory."""

from __future__ import annotations

import io
import struct
import sys

import numpy as np
import pytest
from PIL import Image

from dinocli.data.decode.image import decode, open_image
from dinocli.data.decode.jpeg2000 import Header, cost_fault, open_jpeg2000, read_header
from dinocli.data.decode.pixels import BadImage
from dinocli.data.images import ImagesConfig

imagecodecs = pytest.importorskip("imagecodecs")


def values(bands: int, bits: int, signed: bool = False) -> np.ndarray:
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
    made = np.random.default_rng(0).integers(low, high, (24, 40, bands))
    made[0, 0], made[0, 1] = high - 1, low
    return made.astype(f"{'i' if signed else 'u'}{1 if bits <= 8 else 2}")


def encoded(made: np.ndarray, bits: int, kind: str = "jp2") -> bytes:
    made = made[..., 0] if made.shape[2] == 1 else made
    return imagecodecs.jpeg2k_encode(made, level=0, reversible=True, bitspersample=bits, codecformat=kind)


def scaled(made: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.clip((made.astype(float) - low) * (255 / (high - low)), 0, 255)


@pytest.mark.parametrize("kind", ["jp2", "j2k"])
@pytest.mark.parametrize("bits", [1, 4, 8, 10, 12, 16])
@pytest.mark.parametrize("bands", [1, 2, 3, 4])
def test_every_depth_fills_the_range_and_obeys_the_window(bands: int, bits: int, kind: str) -> None:
    made = values(bands, bits)
    data, top = encoded(made, bits, kind), 2**bits - 1
    for window in (None, (top * 0.2, top * 0.7)):
        low, high = window if window and bits > 8 else (0, top)  # windows apply to deep images only
        colors = scaled(made[..., : 1 if bands < 3 else 3], low, high)
        if bands in (2, 4):
            opacity = made[..., -1:] / top
            colors = colors * opacity + 255 * (1 - opacity)
        seen = decode(data, ImagesConfig(window=window))
        assert np.abs(seen - colors).max() <= (1.01 if bits == 8 else 0.51)  # Pillow composites 8 bits on white
    opened = open_image(data)
    assert (opened.format, opened.deep, opened.height, opened.width) == ("JPEG2000", bits > 8, 24, 40)


def test_a_window_is_in_units_of_the_file() -> None:
    made = np.full((8, 8, 1), 1500, np.uint16)
    assert (decode(encoded(made, 12), ImagesConfig(window=(0, 3000))) == 128).all()
    white = np.full((8, 8, 3), 65535, np.uint16)
    assert (decode(encoded(white, 16)) == 255).all()
    assert (decode(encoded(white // 16, 12)) == 255).all()


@pytest.mark.parametrize("bits", [8, 16])
def test_zero_of_signed_values_becomes_the_middle(bits: int) -> None:
    made = values(3, bits, signed=True)
    top = 2 ** (bits - 1)
    assert np.abs(decode(encoded(made, bits)) - scaled(made, -top, top - 1)).max() <= 0.51
    seen = decode(encoded(made, bits), ImagesConfig(window=(0, top)))
    assert np.abs(seen - scaled(made, 0, top)).max() <= 0.51


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("bands", [5, 13])
def test_each_component_is_a_channel(bands: int, bits: int) -> None:
    made = values(bands, bits)
    data = encoded(made, bits)
    assert np.abs(decode(data, ImagesConfig(channels=bands)) - scaled(made, 0, 2**bits - 1)).max() <= 0.51
    assert decode(data) == BadImage(f"other channels: {bands} (JPEG 2000); expected 3 (images.channels)")
    four = values(4, bits)
    seen = decode(encoded(four, bits), ImagesConfig(channels=4))
    assert np.abs(seen - scaled(four, 0, 2**bits - 1)).max() <= 0.51


def test_the_reason_names_the_depth_and_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    for bits in (12, 16):
        wanted = f"not read here: JPEG 2000 of {bits} bits needs pip install 'dinocli[tiff]'"
        assert decode(encoded(values(3, bits), bits)) == BadImage(wanted)
    assert decode(encoded(values(3, 8), 8)).shape == (24, 40, 3)


def test_the_header_is_parsed() -> None:
    header = read_header(encoded(values(4, 12), 12))
    assert header == Header(40, 24, 960, (12,) * 4, (False,) * 4, space=16)
    file = io.BytesIO()
    Image.new("RGBA", (300, 200)).save(file, "JPEG2000", tile_size=(64, 32))
    header = read_header(file.getvalue())
    assert (header.tile, header.channels) == (2048, (0, 0, 0, 1))
    assert read_header(b"\xff\x4f\xff\x51") is None
    assert read_header(file.getvalue()[:60]) is None
    assert open_jpeg2000(file.getvalue(), 3, 150) is None


def blown_up(data: bytes, side: int, tile: int = 0) -> bytes:
    """Return the file with a larger size in its header."""
    at = data.index(b"\xff\x4f\xff\x51") + 8
    changed = bytearray(data)
    struct.pack_into(">IIIIII", changed, at, side, side, 0, 0, tile or side, tile or side)
    return bytes(changed)


def test_a_file_that_needs_too_much_memory_is_refused_by_its_header() -> None:
    for bits, bands in ((8, 3), (16, 3), (16, 1), (8, 1)):
        data = blown_up(encoded(values(bands, bits), bits), 12_000)
        assert decode(data).reason.startswith("too large: 12000x12000 pixels"), (bits, bands)
    header = Header(11_000, 11_000, 121_000_000, (8,) * 3, (False,) * 3)
    photo = bytes(2_000_000)
    assert cost_fault(photo, header, 150, by_pillow=True) == (
        "too large: 11000x11000 pixels of a JPEG 2000, in one tile, decode to 2783 megabytes, over 1950"
    )
    tiled = Header(11_000, 11_000, 1024**2, (8,) * 3, (False,) * 3)
    assert cost_fault(photo, tiled, 150, by_pillow=True) == ""
    assert cost_fault(photo, header, 300, by_pillow=True) == ""
    gray = Header(11_000, 11_000, 1024**2, (16,), (False,))
    assert cost_fault(photo, gray, 150, by_pillow=False) == ""
    assert cost_fault(bytes(900), tiled, 150, by_pillow=True).startswith("too large: 11000x11000 pixels in 900 bytes")


def test_corrupt_bytes_never_raise() -> None:
    generator = np.random.default_rng(0)
    for whole in (encoded(values(3, 12), 12), encoded(values(5, 8), 8, "j2k")):
        for _ in range(150):
            data = bytearray(whole)
            for place in generator.integers(0, len(data), 3):
                data[place if generator.random() < 0.3 else place % 160] = generator.integers(256)
            decode(bytes(data), ImagesConfig(max_megapixels=1))
