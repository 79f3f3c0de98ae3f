"""Arrays and images of many bands: every layout and number type, and invalid files."""

from __future__ import annotations

import io
import struct
import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinocli.data.decode.arrays import open_array
from dinocli.data.decode.image import decode, open_image
from dinocli.data.decode.pixels import BadImage
from dinocli.data.images import ImagesConfig

CUBE = np.random.default_rng(0).integers(0, 10_000, (20, 30, 13)).astype(np.uint16)


def npy(values: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, values, **options)
    return file.getvalue()


def images(channels: int = 13, **settings: Any) -> ImagesConfig:
    return ImagesConfig(channels=channels, **settings)


def reason(data: bytes, channels: int = 13, **settings: Any) -> str:
    bad = decode(data, images(channels, **settings))
    assert isinstance(bad, BadImage), bad
    return bad.reason


def of_bands(values: np.ndarray, bits: int, order: str = "<", planar: int = 1) -> bytes:
    """Return an uncompressed TIFF with interleaved bands, or with one band after another if `planar` is 2."""
    height, width, bands = values.shape
    rows = values if planar == 1 else values.transpose(2, 0, 1)
    body = rows.astype(np.dtype(f"u{bits // 8}").newbyteorder(order)).tobytes()
    many = (bits,) * bands
    tail = 8 + len(body)
    strips = bands if planar == 2 else 1
    each = len(body) // strips
    starts, sizes = [8 + i * each for i in range(strips)], [each] * strips
    extra, places = b"", []
    for form, numbers in (("H", many), ("I", starts), ("I", sizes)):
        places.append(tail + len(extra))
        extra += struct.pack(order + form * len(numbers), *numbers)
    one = strips == 1
    entries = [
        (256, 4, 1, width), (257, 4, 1, height), (258, 3, bands, places[0]), (259, 3, 1, 1), (262, 3, 1, 1),
        (273, 4, strips, starts[0] if one else places[1]), (277, 3, 1, bands), (278, 4, 1, height),
        (279, 4, strips, each if one else places[2]), (284, 3, 1, planar), (338, 3, 1, 0),
    ]  # fmt: skip
    directory = struct.pack(order + "H", len(entries))
    for tag, kind, count, value in entries:
        short = kind == 3 and count == 1
        directory += struct.pack(
            order + ("HHIHH" if short else "HHII"), tag, kind, count, value, *([0] if short else [])
        )
    start = struct.pack(order + "2sHI", b"II" if order == "<" else b"MM", 42, tail + len(extra))
    return start + body + extra + directory + struct.pack(order + "I", 0)


@pytest.mark.parametrize(
    "values",
    [CUBE, CUBE.transpose(2, 0, 1), np.asfortranarray(CUBE), CUBE.astype(">u2"), CUBE.astype(np.int32)],
    ids=["HWC", "CHW", "by columns", "big-endian", "int32"],
)
def test_every_layout_gives_the_same_pixels(values: np.ndarray) -> None:
    pixels = decode(npy(values), images(window=(0, 10_000)))
    assert pixels.shape == CUBE.shape
    assert np.abs(pixels - CUBE * (255 / 10_000)).max() <= 0.51
    opened = open_image(npy(values), images())
    assert (opened.height, opened.width, opened.format, opened.mode) == (20, 30, "NPY", "I")


def test_8_bit_values_are_unchanged_even_with_a_window() -> None:
    values = (CUBE // 40).astype(np.uint8)
    for window in (None, (0, 10)):
        assert np.array_equal(decode(npy(values), images(window=window)), values)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 32])
def test_any_number_of_channels(channels: int) -> None:
    values = np.random.default_rng(1).integers(0, 256, (9, 11, channels), dtype=np.uint8)
    assert np.array_equal(decode(npy(values), images(channels)), values)
    assert np.array_equal(decode(npy(values.transpose(2, 0, 1)), images(channels)), values)


def test_one_channel_needs_no_axis() -> None:
    values = (CUBE[..., 0] // 40).astype(np.uint8)
    assert np.array_equal(decode(npy(values), images(1))[..., 0], values)
    assert "an array of 20x30; expected 3 (images.channels)" in reason(npy(values), 3)


def test_a_window_per_channel_scales_each_channel() -> None:
    windows = [(100.0 * i, 5000.0 + 400 * i) for i in range(13)]
    pixels = decode(npy(CUBE), images(window=windows))
    for i, (low, high) in enumerate(windows):
        alone = decode(npy(CUBE[..., i]), images(1, window=(low, high)))
        assert np.array_equal(pixels[..., i], alone[..., 0])
    assert len({int(pixels[..., i].mean()) for i in range(13)}) > 5


@pytest.mark.parametrize(
    ("values", "white"),
    [
        (np.uint16([[[0, 65535]]]), 65535),
        (np.float32([[[0, 1]]]), 1),
        (np.float16([[[0, 1]]]), 1),
        (np.float64([[[0, 255]]]), 255),
        (np.int16([[[0, 32767]]]), 65535),
    ],
)
def test_without_a_window_depth_or_usual_range_sets_the_scale(values: np.ndarray, white: float) -> None:
    pixels = decode(npy(np.broadcast_to(values, (4, 4, 2))), images(2))
    assert np.array_equal(pixels[0, 0], np.floor(values[0, 0].astype(float) * 255 / white + 0.5))


def test_nan_becomes_black_and_all_nan_is_refused() -> None:
    values = np.full((4, 4, 2), 0.5, np.float32)
    values[0, 0] = np.nan
    values[0, 1] = np.inf
    pixels = decode(npy(values), images(2, window=(0, 1)))
    assert pixels[0, 0].tolist() == [0, 0]
    assert pixels[0, 1].tolist() == [255, 255]
    assert pixels[1, 1].tolist() == [128, 128]
    assert reason(npy(np.full((4, 4, 2), np.nan)), 2) == "damaged: none of its values is a number"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (npy(CUBE[..., :12]), "other channels: an array of 20x30x12; expected 13 (images.channels)"),
        (npy(CUBE[..., :0]), "other channels: an array of 20x30x0; expected"),
        (npy(np.zeros((13, 0, 5), np.uint8)), "too "),
        (npy(np.float32(3)), "other channels: an array of one number; expected"),
        (npy(np.zeros((2, 20, 30, 13), np.uint8)), "other channels: an array of 2x20x30x13; expected"),
        (npy(CUBE)[:-1], "truncated: "),
        (npy(CUBE)[:40], "truncated: "),
        (npy(CUBE)[:6], "truncated: "),
        (npy(np.array([[[{}] * 13]]), allow_pickle=True), "no image: the array holds objects"),
        (npy(np.full((4, 4, 13), "x")), "no image: the array holds <U1; expected numbers"),
        (npy(np.zeros((4, 4, 13), complex)), "no image: "),
        (npy(np.zeros((4, 4, 13), "u1,f4")), "no image: "),
        (npy(np.zeros((4, 4, 13), "M8[s]")), "no image: "),
        (npy(np.zeros((1, 30, 13), np.uint8)), "too small: "),
        (npy(np.zeros((2, 300, 13), np.uint8)), "too long: "),
        (npy(CUBE).replace(b"(20, 30, 13)", b"(-2, 30, 13)"), "too "),
        (npy(CUBE).replace(b"(20, 30, 13)", b"(9999999, 9999999, 13)")[:999], "too large: 9999999x9999999 pixels of 13"),
        (npy(CUBE).replace(b"\x93NUMPY\x01", b"\x93NUMPY\x09"), ""),
        (b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 70000, "damaged: "),
    ],
)  # fmt: skip
def test_arrays_that_are_no_image_are_refused_with_a_reason(data: bytes, words: str) -> None:
    assert reason(data).startswith(words)


def test_a_large_array_is_refused_by_its_number_of_values() -> None:
    assert reason(npy(CUBE), max_megapixels=0.0025).startswith("too large: 30x20 pixels of 13 channels")
    assert not isinstance(decode(npy(CUBE), images(max_megapixels=0.0027)), BadImage)


def test_corrupt_bytes_never_raise() -> None:
    generator, seen = np.random.default_rng(0), set()
    for whole in (npy(CUBE[:6, :6]), of_bands(CUBE[:6, :6], 16)):
        for _ in range(400):
            data = bytearray(whole)
            for place in generator.integers(0, len(data), 4):
                data[place if generator.random() < 0.3 else place % 128] = generator.integers(256)
            found = decode(bytes(data), images())
            seen.add(type(found))
    assert BadImage in seen


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("planar", [1, 2])
def test_a_tiff_of_many_bands(order: str, planar: int) -> None:
    pytest.importorskip("tifffile")
    data = of_bands(CUBE, 16, order, planar)
    assert np.array_equal(decode(data, images(window=(0, 10_000))), decode(npy(CUBE), images(window=(0, 10_000))))
    opened = open_image(data, images())
    assert (opened.height, opened.width, opened.format, opened.mode) == (20, 30, "TIFF", "I")
    assert reason(data[: len(data) // 2])


def test_four_bands_keep_their_16_bits() -> None:
    pytest.importorskip("tifffile")
    values = CUBE[..., :4] // 100  # below the 8 bits that Pillow keeps
    pixels = decode(of_bands(values, 16), images(4, window=(0, 100)))
    assert np.abs(pixels - values * 2.55).max() <= 0.51
    assert len(np.unique(pixels)) > 50


def test_a_tiff_with_another_number_of_bands_is_refused() -> None:
    for channels in (1, 3, 4):
        assert reason(of_bands(CUBE, 16), channels) == f"other channels: 13; expected {channels} (images.channels)"


def test_the_reason_names_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tifffile", None)
    assert "pip install 'dinocli[tiff]'" in reason(of_bands(CUBE, 16))


def test_layouts_that_pillow_reads_are_left_to_it() -> None:
    file = io.BytesIO()
    Image.fromarray((CUBE[..., :3] // 40).astype(np.uint8)).save(file, "PNG")
    for channels in (1, 3, 4):
        assert open_array(file.getvalue(), images(channels)) is None
    assert open_array(b"\xff\xd8\xff", images(3)) is None
    assert open_array(b"\x01\xda\0\1" + bytes(600), images(3)) is None


def sgi(values: np.ndarray) -> bytes:
    """Return an unpacked 16-bit SGI, which stores rows from bottom to top."""
    height, width, bands = values.shape
    head = struct.pack(">HBBHHHH", 474, 0, 2, 3, width, height, bands)
    return head.ljust(512, b"\0") + values[::-1].transpose(2, 0, 1).astype(">u2").tobytes()


@pytest.mark.parametrize("bands", [1, 3])
def test_an_sgi_keeps_its_16_bits(bands: int) -> None:
    values = CUBE[..., :bands]
    for window, low, high in ((None, 0, 65535), ((1000, 9000), 1000, 9000)):
        seen = decode(sgi(values), images(3, window=window))
        wanted = np.clip((values.astype(float) - low) * 255 / (high - low), 0, 255)
        assert np.abs(seen - wanted).max() <= 0.51
    assert open_image(sgi(values), images(3)).deep
    assert reason(sgi(values)[:-1], 3).startswith("truncated: ")
    packed = bytearray(sgi(values))
    packed[2] = 1
    assert reason(bytes(packed), 3).startswith("not read here: 16-bit SGI")


def test_bytes_per_pixel_count_towards_the_limit() -> None:
    data = npy(np.zeros((100, 100), np.float64))[:128]
    assert reason(data, 1, max_megapixels=0.0101).startswith("too large: 100x100 pixels of 8 bytes")
