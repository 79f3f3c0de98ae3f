"""JPEG 2000: header, memory cost of decoding, and depths other than 8 bits."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinocli.data.decode.bit_depth import Alpha, Layout
from dinocli.data.decode.raster import MISSING, ArrayFile, UnfitArray, other_channels
from dinocli.data.images import megabytes_over

_BOX = b"\0\0\0\x0cjP  \r\n\x87\n"
_STREAM = b"\xff\x4f\xff\x51"
_NESTED = (b"jp2h", b"asoc")
_CMYK = 12  # enumerated color spaces; OpenJPEG converts sYCC to RGB
_READ_SPACES = (0, _CMYK, 16, 17, 18)
_OPACITY, _PREMULTIPLIED = 1, 2  # channel types
# Files of over _SMALL samples and _PLAINEST samples per byte are attacks on memory: no real picture is so plain.
_PLAINEST, _SMALL = 10_000, 20_000_000


@dataclass(frozen=True)
class Header:
    """Properties of a JPEG 2000 file that decide how to decode it.

    Attributes:
        width: Width in pixels.
        height: Height in pixels.
        tile: Number of pixels in the largest tile.
        bits: Bit depth of each component.
        signed: True for each signed component.
        subsampled: True if a component has fewer pixels than the image.
        space: Enumerated color space; 0 if not stated.
        palette: True if the components are palette indices.
        channels: Type of each channel; empty if not stated.
    """

    width: int
    height: int
    tile: int
    bits: tuple[int, ...]
    signed: tuple[bool, ...]
    subsampled: bool = False
    space: int = 0
    palette: bool = False
    channels: tuple[int, ...] = ()


def is_jpeg2000(data: bytes) -> bool:
    """Recognize a JPEG 2000 by its first bytes."""
    return data.startswith((_BOX, _STREAM))


def read_header(data: bytes) -> Header | None:
    """Read the boxes and the SIZ marker; None for corrupt and for other files."""
    try:
        return _read_boxes(data) if data.startswith(_BOX) else _read_size(data, 0, {})
    except (struct.error, ValueError, IndexError):
        return None


def _read_boxes(data: bytes) -> Header | None:
    found: dict[str, Any] = {}
    for kind, start, end in _boxes(data, 0, len(data)):
        if kind == b"colr" and data[start] == 1 and "space" not in found:
            (found["space"],) = struct.unpack_from(">I", data, start + 3)
        elif kind == b"pclr":
            found["palette"] = True
        elif kind == b"cdef":
            (count,) = struct.unpack_from(">H", data, start)
            entries = dict(struct.unpack_from(">HH", data, start + 2 + 6 * i) for i in range(min(count, 64)))
            found["channels"] = tuple(entries.get(i, 0) for i in range(max(entries, default=-1) + 1))[:64]
        elif kind == b"jp2c":
            return _read_size(data[start : min(end, start + 60_000)], 0, found)
    return None


def _boxes(data: bytes, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    for _ in range(1000):
        if at + 8 > end:
            return
        length, kind = struct.unpack_from(">I4s", data, at)
        start = at + 8
        if length == 1:
            (length,) = struct.unpack_from(">Q", data, start)
            start += 8
        stop = end if length == 0 else at + length
        if stop < start:
            return
        if kind in _NESTED:
            yield from _boxes(data, start, min(stop, end))
        else:
            yield kind, start, min(stop, end)
        at = stop


def _read_size(data: bytes, at: int, found: dict[str, Any]) -> Header | None:
    if data[at : at + 4] != _STREAM:
        return None
    right, low, left, top, tile_width, tile_height, _, _, count = struct.unpack_from(">IIIIIIIIH", data, at + 8)
    width, height = right - left, low - top
    if width <= 0 or height <= 0 or not 0 < count <= 16384:
        return None
    parts = [struct.unpack_from(">BBB", data, at + 42 + 3 * i) for i in range(count)]
    tile = min(tile_width, width) * min(tile_height, height)
    bits, signed = tuple((p & 127) + 1 for p, _, _ in parts), tuple(p > 127 for p, _, _ in parts)
    return Header(width, height, tile, bits, signed, any(p[1:] != (1, 1) for p in parts), **found)


def cost_fault(data: bytes, header: Header, megapixels: float, by_pillow: bool) -> str:
    """Return the reason if decoding would take too much memory; empty otherwise.

    OpenJPEG holds four bytes per sample: of one tile if Pillow decodes, of the whole image if imagecodecs does.

    Args:
        data: Content of the file.
        header: Size, components and depths.
        megapixels: Limit `images.max_megapixels`. Decoding may take 13 bytes per pixel of this limit.
        by_pillow: True if Pillow decodes the file.
    """
    pixels, count = header.width * header.height, len(header.bits)
    size = f"{header.width}x{header.height} pixels"
    if pixels * count > max(_SMALL, _PLAINEST * len(data)):
        return f"too large: {size} in {len(data)} bytes; no picture compresses that far"
    deep = 1 + (max(header.bits) > 8)
    needed = header.tile * count * 5 + pixels * 8 if by_pillow else pixels * count * (5 + deep)
    if needed > 13e6 * megapixels:
        tiles = ", in one tile," if by_pillow and header.tile == pixels else ""
        return f"too large: {size} of a JPEG 2000{tiles} decode to {megabytes_over(needed, 13 * megapixels)}"
    return ""


def open_jpeg2000(data: bytes, channels: int, megapixels: float) -> ArrayFile | None:
    """Read the header of a JPEG 2000 within the limit `megapixels` (`images.max_megapixels`).

    Returns:
        The header; None for a corrupt file, and for one that Pillow reads correctly (8 bits and up to four components).

    Raises:
        UnfitArray: If the number of channels does not fit `channels`, decoding takes too much memory, or nothing here
            reads the file.
    """
    header = read_header(data)
    if header is None:
        return None
    count = len(header.bits)
    plain = count <= 4 and set(header.bits) == {8} and not any(header.signed)
    if plain or header.palette:
        if fault := cost_fault(data, header, megapixels, by_pillow=True):
            raise UnfitArray(fault)
        return None
    layout = _layout(header, channels)
    bits = max(header.bits)
    what = f"JPEG 2000 of {bits} bits" if bits != 8 else f"JPEG 2000 of {count} components"
    mixed = len(set(zip(header.bits, header.signed, strict=True))) > 1 or header.subsampled
    if mixed or bits > 16 or (channels in (1, 3) and header.space not in _READ_SPACES):
        which = "whose components differ" if mixed else f"in color space {header.space}" if bits <= 16 else "each"
        raise UnfitArray(f"not read here: {what} {which}; convert it to TIFF or PNG")
    if fault := cost_fault(data, header, megapixels, by_pillow=False):
        raise UnfitArray(fault)
    try:
        codecs = import_module("imagecodecs")
    except ImportError as error:
        raise UnfitArray(f"not read here: {what} {MISSING}") from error

    def read() -> NDArray[Any]:
        values: NDArray[Any] = codecs.jpeg2k_decode(data)
        return values.reshape(header.height, header.width, -1)

    dtype = np.dtype(f"{'i' if any(header.signed) else 'u'}{1 if bits <= 8 else 2}")
    return ArrayFile("JPEG2000", header.height, header.width, count, dtype, layout, read)


def _layout(header: Header, channels: int) -> Layout:
    count = len(header.bits)
    low, high = _range(header, 0)
    if channels not in (1, 3) or count > 4:
        if count != channels:
            raise UnfitArray(other_channels(f"{count} (JPEG 2000)", channels))
        return Layout("bands", (low, high))
    if count == 4 and header.space == _CMYK:
        return Layout("cmyk", (low, high))
    alpha: Alpha = ""
    if count in (2, 4):  # opacity unless the file states otherwise, as Pillow assumes for 8 bits
        kinds: dict[int, Alpha] = {_OPACITY: "straight", _PREMULTIPLIED: "premultiplied"}
        alpha = kinds.get(header.channels[count - 1], "") if len(header.channels) == count else "straight"
        if count == 2 and not alpha:
            raise UnfitArray(other_channels("2 (JPEG 2000)", channels))
    return Layout("gray" if count < 3 else "rgb", (low, high), alpha)


def _range(header: Header, component: int) -> tuple[float, float]:
    steps = 2 ** header.bits[component]
    return (-steps // 2, steps // 2 - 1) if header.signed[component] else (0, steps - 1)
