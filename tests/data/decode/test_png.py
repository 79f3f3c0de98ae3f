"""16-bit PNGs: every color type, window and transparency against computed values."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dinocli.data.decode.image import decode, open_image
from dinocli.data.decode.pixels import BadImage
from dinocli.data.decode.png import open_png
from dinocli.data.images import ImagesConfig

TYPES = {1: 0, 2: 4, 3: 2, 4: 6}
VALUES = np.random.default_rng(0).integers(0, 65536, (20, 30, 4), dtype=np.uint16)
VALUES[0, 0] = 65535
VALUES[0, 1] = 0
WINDOWS = [None, (10_000, 50_000), (0, 3_000)]


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(values: np.ndarray, *chunks: tuple[bytes, bytes], bits: int = 16) -> bytes:
    height, width, bands = values.shape
    rows = []
    above = np.zeros(width * bands * bits // 8, np.uint8)
    for number, row in enumerate(values.astype(f">u{bits // 8}")):
        octets = np.frombuffer(row.tobytes(), np.uint8)
        step = bands * bits // 8
        left = np.concatenate([np.zeros(step, np.uint8), octets[:-step]])
        rows.append(bytes([number % 3]) + (octets - (0, left, above)[number % 3]).astype(np.uint8).tobytes())
        above = octets
    head = struct.pack(">IIBBBBB", width, height, bits, TYPES[bands], 0, 0, 0)
    body = b"".join(chunk(*each) for each in [*chunks, (b"IDAT", zlib.compress(b"".join(rows))), (b"IEND", b"")])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + body


def scaled(values: np.ndarray, window: tuple[int, int] | None) -> np.ndarray:
    low, high = window or (0, 65535)
    return np.clip((values.astype(float) - low) * (255 / (high - low)), 0, 255)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("bands", [1, 2, 3, 4])
def test_values_and_opacity_of_16_bits(bands: int, window: tuple[int, int] | None) -> None:
    values = VALUES[..., :bands]
    colors = scaled(values[..., : 1 if bands < 3 else 3], window)
    if bands in (2, 4):
        opacity = values[..., -1:] / 65535
        colors = colors * opacity + 255 * (1 - opacity)
    seen = decode(png(values), ImagesConfig(window=window))
    assert np.abs(seen - colors).max() <= 0.51
    gray = decode(png(values), ImagesConfig(window=window, channels=1))
    wanted = np.asarray(Image.fromarray(seen).convert("L"))
    assert np.array_equal(gray[..., 0], wanted)
    opened = open_image(png(values))
    assert (opened.deep, opened.format, opened.pages) == (True, "PNG", 1)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("bands", [2, 4])
def test_channels_are_unconverted_unless_1_or_3_are_requested(bands: int, window: tuple[int, int] | None) -> None:
    seen = decode(png(VALUES[..., :bands]), ImagesConfig(channels=bands, window=window))
    assert np.abs(seen - scaled(VALUES[..., :bands], window)).max() <= 0.51
    assert decode(png(VALUES[..., :bands]), ImagesConfig(channels=13)).reason.startswith(f"other channels: {bands} ")


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("bands", [1, 3])
def test_a_transparent_color_is_compared_in_16_bits(bands: int, window: tuple[int, int] | None) -> None:
    values = np.full((6, 8, bands), 0x1234, np.uint16)
    values[:, :4] = 0x1235  # the same upper byte
    key = struct.pack(f">{bands}H", *[0x1234] * bands)
    wanted = scaled(values, window)
    wanted[:, 4:] = 255
    seen = decode(png(values, (b"tRNS", key)), ImagesConfig(window=window))
    assert np.abs(seen - wanted).max() <= 0.51


def test_white_on_transparent_is_composited_on_black_and_an_all_zero_alpha_ignored() -> None:
    drawn = np.full((6, 8, 4), 65535, np.uint16)
    drawn[..., 3] = 0
    drawn[2, 3, 3] = 65535
    seen = decode(png(drawn))
    assert (seen[2, 3].tolist(), int(seen.min())) == ([255] * 3, 0)
    bare = VALUES.copy()
    bare[..., 3] = 0
    assert np.abs(decode(png(bare)) - scaled(bare[..., :3], None)).max() <= 0.51


def test_a_window_per_channel_and_an_orientation() -> None:
    windows = ((0, 65535), (1000, 30_000), (20_000, 65535))
    exif = Image.Exif()
    exif[0x0112] = 6
    data = png(VALUES[..., :3], (b"eXIf", exif.tobytes()[6:]))
    seen = decode(data, ImagesConfig(window=windows))
    wanted = np.stack([scaled(VALUES[..., i], w) for i, w in enumerate(windows)], -1)
    assert np.abs(seen - np.rot90(wanted, -1)).max() <= 0.51
    assert (open_image(data).height, open_image(data).width) == (30, 20)


def test_a_truncated_file_is_refused_or_filled_with_grey() -> None:
    for bands in (1, 2, 3, 4):
        values = np.random.default_rng(1).integers(0, 65536, (80, 120, bands), dtype=np.uint16)
        data = png(values)[:-4000]
        assert decode(data).reason.startswith("truncated: ")
        seen = decode(data, ImagesConfig(truncated=True))
        assert (seen[-3:] == 128).all()
        assert np.array_equal(seen[:9], decode(png(values))[:9])


def test_other_files_are_left_to_pillow() -> None:
    assert open_png(png(np.uint8(VALUES >> 8), bits=8), 3) is None
    assert open_png(b"\x89PNG\r\n\x1a\n" + bytes(9), 3) is None
    broken = bytearray(png(VALUES))
    broken[24] = 3
    assert isinstance(decode(bytes(broken)), BadImage)
