"""Netpbm files: every kind, depth and window against computed values."""

from __future__ import annotations

import io
import warnings

import numpy as np
import pytest
from PIL import Image

from dinocli.data.decode.image import decode, open_image
from dinocli.data.decode.pixels import BadImage
from dinocli.data.decode.pnm import open_pnm
from dinocli.data.images import ImagesConfig


def made(bands: int, top: int) -> np.ndarray:
    values = np.random.default_rng(0).integers(0, top + 1, (20, 30, bands))
    values[0, 0], values[0, 1] = top, 0
    return values


def binary(values: np.ndarray, top: int) -> bytes:
    kind = b"P6" if values.shape[2] == 3 else b"P5"
    return kind + b"\n# a comment\n30 20\n%d\n" % top + values.astype(">u2" if top > 255 else "u1").tobytes()


def text(values: np.ndarray, top: int) -> bytes:
    rows = "\n".join(" ".join(map(str, row)) + " # of one row" for row in values.reshape(20, -1).tolist())
    return f"P{3 if values.shape[2] == 3 else 2} 30 20 {top}\n{rows}".encode()


def scaled(values: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.repeat(np.clip((values - low) * (255 / (high - low)), 0, 255), 3 // values.shape[2], -1)


@pytest.mark.parametrize("form", [binary, text])
@pytest.mark.parametrize("bands", [1, 3])
@pytest.mark.parametrize("top", [1, 100, 255, 256, 1000, 4095, 65535])
def test_every_depth_fills_the_range_and_obeys_the_window(form, bands: int, top: int) -> None:
    values = made(bands, top)
    data = form(values, top)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.abs(decode(data) - scaled(values, 0, top)).max() <= 0.51
    window = (top * 0.2, top * 0.7)
    wanted = scaled(values, *window) if top > 255 else scaled(values, 0, top)
    assert np.abs(decode(data, ImagesConfig(window=window)) - wanted).max() <= 0.51
    assert open_image(data).deep == (top > 255)
    assert decode(data[:-40]).reason.startswith("truncated: ")
    kept = decode(data[: len(data) // 2], ImagesConfig(truncated=True))
    assert np.abs(kept[-1].astype(int) - 128).max() <= (127 if top == 1 else 2)


def test_bits_as_text_need_no_spaces() -> None:
    bits = made(1, 1)[..., 0]
    for between in ("", " "):
        data = ("P1\n30 20\n" + "\n".join(between.join(map(str, row)) for row in bits.tolist())).encode()
        assert np.array_equal(decode(data)[..., 0], np.uint8(255 * (1 - bits)))
    assert decode(b"P1 2 2 0121").reason.startswith("damaged: ")
    packed = io.BytesIO()
    Image.fromarray(bits == 0).save(packed, "PPM")
    assert np.array_equal(decode(packed.getvalue())[..., 0], np.uint8(255 * (1 - bits)))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("bands", [1, 3])
def test_rows_of_a_pfm_are_stored_bottom_to_top(order: str, bands: int) -> None:
    values = (made(bands, 1000) / 1000).astype(f"{order}f4")
    head = b"P%s\n30 20\n%s\n" % (b"F" if bands == 3 else b"f", b"-1.0" if order == "<" else b"1.0")
    data = head + values[::-1].tobytes()
    assert np.abs(decode(data) - scaled(values, 0, 1)).max() <= 0.51
    assert np.abs(decode(data, ImagesConfig(window=(0.2, 0.5))) - scaled(values, 0.2, 0.5)).max() <= 0.51
    assert decode(data[:-1]).reason.startswith("truncated: ")


def test_another_number_of_channels_and_damage_are_named() -> None:
    assert decode(binary(made(3, 4095), 4095), ImagesConfig(channels=4)).reason.startswith("other channels: 3 (RGB)")
    for data in (b"P5 9", b"P2 30 20 100\n1 x 2", b"P5 30 20 0\n" + bytes(600), b"P6 99999 99999 65535\n"):
        assert isinstance(decode(data), BadImage)
    assert open_pnm(binary(made(3, 255), 255), 3) is None
    assert isinstance(decode(b"P2" + b" " * 200_000 + b"2 2 9 1 2 3 4"), BadImage)
