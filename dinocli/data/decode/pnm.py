"""Netpbm files: deep ones at full depth, text ones without Pillow's slow loop, and color PFM."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinocli.data.decode.bit_depth import Layout
from dinocli.data.decode.raster import ArrayFile, UnfitArray, other_channels

_SPACE = rb"(?:[ \t\n\v\f\r]|#[^\r\n]*+[\r\n])++"
_HEADER = re.compile(
    rb"P([1-6])" + _SPACE + rb"(\d{1,9})" + _SPACE + rb"(\d{1,9})(?:" + _SPACE + rb"(\d{1,5}))?(?=[ \t\n\v\f\r])"
)
_FLOATS = re.compile(rb"P([fF])\s+(\d{1,9})\s+(\d{1,9})\s+([+-]?[\d.eE+-]{1,30})\s")
_LONGEST_HEADER = 100_000
_COMMENT = re.compile(rb"#[^\r\n]*")


def open_pnm(data: bytes, channels: int, truncated: bool = False) -> ArrayFile | None:
    """Read the header of a PBM, PGM, PPM or PFM.

    If `truncated`, reading fills the missing end of a file with grey instead of raising EOFError, except for PFM.

    Returns:
        The header; None for other files, and for binary ones of 1 or 8 bits, which Pillow reads equally well.

    Raises:
        UnfitArray: If the number of channels does not fit `channels`.
    """
    if floats := _FLOATS.match(data, 0, _LONGEST_HEADER):
        return _open_floats(data, floats, channels)
    found = _HEADER.match(data, 0, _LONGEST_HEADER)
    if not found:
        return None
    kind, width, height = (int(found[i]) for i in (1, 2, 3))
    if kind in (1, 4):  # bitmaps state no maximum: a fourth number is a pixel
        if kind == 4:
            return None
        end, top = found.end(3), 1
    elif not found[4] or not 0 < int(found[4]) < 65536:
        return None
    else:
        end, top = found.end(4), int(found[4])
    if kind in (5, 6) and top == 255:
        return None
    bands = 3 if kind in (3, 6) else 1
    if bands != channels and channels not in (1, 3):
        raise UnfitArray(other_channels(f"{bands} ({'RGB' if bands == 3 else 'L'})", channels))
    dtype = np.dtype(">u2" if top > 255 else "u1")
    read_values = partial(_read_text, bits=kind == 1) if kind < 4 else _read_binary

    def read() -> NDArray[Any]:
        values = read_values(data, end, height * width * bands, dtype)
        if missing := height * width * bands - len(values):
            if not truncated:
                raise EOFError("image file is truncated")
            values = np.concatenate([values, np.full(missing, (top + 1) // 2, dtype)])
        return values.reshape(height, width, bands)

    layout = Layout("rgb" if bands == 3 else "gray", (0, top), inverted=kind == 1)
    return ArrayFile("PPM", height, width, bands, dtype, layout, read)


def _read_binary(data: bytes, end: int, count: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    there = max(0, len(data) - end - 1) // dtype.itemsize
    return np.frombuffer(data, dtype, min(count, there), end + 1)


def _read_text(data: bytes, end: int, count: int, dtype: np.dtype[Any], bits: bool) -> NDArray[Any]:
    text = _COMMENT.sub(b"", data[end:]) if b"#" in data else data[end:]
    if text.translate(None, b"01 \t\n\v\f\r" if bits else b"0123456789 \t\n\v\f\r"):
        raise ValueError("expected a number")
    if bits:  # bits need no space between them
        digits = np.frombuffer(text, np.uint8)
        return digits[digits >= 48][:count] - 48
    # With a count, NumPy fills missing values with uninitialized memory.
    values = np.fromstring(text.decode("ascii"), np.int32, sep=" ") if text.strip() else np.empty(0, np.int32)
    return values[:count].astype(dtype)


def _open_floats(data: bytes, found: re.Match[bytes], channels: int) -> ArrayFile:
    bands, width, height = 3 if found[1] == b"F" else 1, int(found[2]), int(found[3])
    if bands != channels and channels not in (1, 3):
        raise UnfitArray(other_channels(f"{bands} (F)", channels))
    dtype = np.dtype("<f4" if float(found[4]) < 0 else ">f4")

    def read() -> NDArray[Any]:
        values = _read_binary(data, found.end() - 1, height * width * bands, dtype)
        if len(values) < height * width * bands:
            raise EOFError("image file is truncated")
        return values.reshape(height, width, bands)[::-1]  # rows are stored bottom to top

    return ArrayFile("PPM", height, width, bands, dtype, Layout("rgb" if bands == 3 else "gray"), read)
