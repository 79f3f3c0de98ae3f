"""JPEG XL: size and orientation from the header, pixels from libjxl."""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dinocli.data.decode.guards import size_fault
from dinocli.data.decode.raster import ArrayFile, UnfitArray, picture_layout
from dinocli.data.images import ImagesConfig

_STREAM = b"\xff\x0a"
_BOXES = b"\0\0\0\x0cJXL \r\n\x87\n"
SIGNATURES = (_STREAM, _BOXES)
_SIZES = (9, 13, 18, 30)  # bits of a side, by a two-bit choice
_RATIOS = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))  # width to height
_HEADER = 32  # bytes of the code stream that hold the size and the orientation
_EXIF_ORIENTATION = 0x0112


class Header(NamedTuple):
    """Size of the stored picture in pixels, and the orientation that libjxl applies to it."""

    width: int
    height: int
    turn: int


def open_jxl(data: bytes, images: ImagesConfig) -> ArrayFile | None:
    """Decode the first frame of a JPEG XL, if its size is within the limits; None without the package imagecodecs.

    libjxl applies the orientation in the code stream. The one in Exif is applied only if the code stream states none:
    writers such as Pillow's plugin store it there alone.

    Raises:
        UnfitArray: If the number of channels or the size does not fit `images`.
        ValueError: If the file is corrupt.
    """
    header = read_header(data)
    if fault := size_fault((header.width, header.height), images):
        raise UnfitArray(fault.reason)
    try:
        codecs: Any = import_module("imagecodecs")
        values = codecs.jpegxl_decode(data, index=0, numthreads=1)
    except (ImportError, AttributeError):  # builds without libjxl lack the function
        return None
    values = values[..., None] if values.ndim == 2 else values
    top = 1.0 if values.dtype.kind == "f" else float(np.iinfo(values.dtype).max)
    layout = picture_layout("JPEG XL", values.shape[2], (0.0, top), images.channels)
    turn = _exif_orientation(data) if header.turn == 1 else 1
    height, width, bands = values.shape
    return ArrayFile("JXL", height, width, bands, values.dtype, layout, lambda: values, turn)


def read_header(data: bytes) -> Header:
    """Read the first fields of the code stream.

    Raises:
        ValueError: If the file is corrupt.

    Source: ISO/IEC 18181-1, SizeHeader and ImageMetadata; 18181-2, boxes.
    """
    stream = _find_stream(data)
    if not stream.startswith(_STREAM):
        raise ValueError("the file holds no JPEG XL code stream")
    bits, at = int.from_bytes(stream[2:_HEADER], "little"), 0

    def take(count: int) -> int:
        nonlocal at
        at += count
        return (bits >> (at - count)) & ((1 << count) - 1)

    def side(small: int) -> int:
        return 8 * (take(5) + 1) if small else take(_SIZES[take(2)]) + 1

    small = take(1)
    height = side(small)
    ratio = take(3)
    width = height * _RATIOS[ratio - 1][0] // _RATIOS[ratio - 1][1] if ratio else side(small)
    default = take(1)
    return Header(width, height, 1 if default or not take(1) else take(3) + 1)


def _boxes(data: bytes) -> dict[bytes, bytes]:
    """Return the content of each box; parts of a code stream are joined, in order."""
    found: dict[bytes, bytes] = {}
    at = 0
    while at + 8 <= len(data):
        size, kind, start = int.from_bytes(data[at : at + 4]), data[at + 4 : at + 8], at + 8
        if size == 1:
            size, start = int.from_bytes(data[start : start + 8]), start + 8
        end = at + size if size else len(data)
        if end < start:
            raise ValueError("a box of negative size")
        part = data[start : min(end, start + 2**16)]  # the header is at the beginning, and Exif is short
        found[kind] = found.get(kind, b"") + (part[4:] if kind == b"jxlp" else part)
        at = end
    return found


def _find_stream(data: bytes) -> bytes:
    if not data.startswith(_BOXES):
        return data
    boxes = _boxes(data)
    return boxes.get(b"jxlc") or boxes.get(b"jxlp", b"")


def _exif_orientation(data: bytes) -> int:
    """Return the orientation of an uncompressed Exif box; 1 if there is none."""
    if not data.startswith(_BOXES) or not (box := _boxes(data).get(b"Exif")):
        return 1
    exif = Image.Exif()
    try:
        exif.load(b"Exif\0\0" + box[4 + int.from_bytes(box[:4]) :])  # the box begins with an offset
        return int(exif.get(_EXIF_ORIENTATION, 1))
    except Exception:  # corrupt Exif is no reason to refuse a picture
        return 1
