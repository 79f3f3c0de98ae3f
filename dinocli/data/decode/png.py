"""16-bit PNGs. Pillow keeps only their upper 8 bits and drops a transparent color."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from dinocli.data.decode.bit_depth import Layout
from dinocli.data.decode.guards import BODY, Reader
from dinocli.data.decode.raster import ArrayFile, UnfitArray, other_channels

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_BANDS = {0: ("L", 1), 2: ("RGB", 3), 4: ("LA", 2), 6: ("RGBA", 4)}  # by color type


def open_png(data: bytes, channels: int) -> ArrayFile | None:
    """Read the header of a 16-bit PNG.

    Returns:
        The header; None for other files and those that Pillow refuses too.

    Raises:
        UnfitArray: If the number of channels does not fit `channels`.
    """
    if not data.startswith(SIGNATURE) or len(data) < 33:
        return None
    length, kind, width, height, bits, color = struct.unpack_from(">I4sIIBB", data, 8)
    if (length, kind, bits) != (13, b"IHDR", 16) or color not in _BANDS or not (width and height):
        return None
    name, bands = _BANDS[color]
    if channels not in (1, 3) and bands != channels:
        raise _unfit(name, bands, channels)
    layout = Layout(
        "bands" if channels not in (1, 3) else "rgb" if color & 2 else "gray",
        (0, 65535),
        alpha="straight" if color & 4 and channels in (1, 3) else "",
        key=_transparent(data, bands) if not color & 4 and channels in (1, 3) else None,
    )
    return ArrayFile("PNG", height, width, bands, np.dtype(np.uint16), layout, lambda: _read(data, bands))


def _unfit(name: str, bands: int, channels: int) -> UnfitArray:
    return UnfitArray(other_channels(f"{bands} ({name})", channels))


def _transparent(data: bytes, bands: int) -> tuple[int, ...] | None:
    """Return the transparent color of the tRNS chunk in 16 bits."""
    at = 33
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"IDAT":
            return None
        if kind == b"tRNS" and length == 2 * bands and at + 8 + length <= len(data):
            return struct.unpack_from(f">{bands}H", data, at + 8)
        at += 12 + length
    return None


def _read(data: bytes, bands: int) -> NDArray[Any]:
    """Read all 16 bits through Pillow, because torchvision's libpng crashes on corrupt files."""
    if bands == 1:
        return _read_as(data, "I;16", "I;16B", 32768)[..., None].astype(np.uint16)
    if bands == 2:  # four bytes per pixel, like four bands of 8 bits
        octets = _read_as(data, "RGBA", "RGBA", (128, 128, 255, 255))
        return octets.reshape(*octets.shape[:2], 2, 2).view(">u2")[..., 0].astype(np.uint16)
    mode, gray = ("RGB", (128,) * 3) if bands == 3 else ("RGBA", (128, 128, 128, 255))
    # Pillow keeps the high byte of each value. Read in the wrong byte order, that is the low byte.
    values = _read_as(data, mode, f"{mode};16B", gray).astype(np.uint16) << 8
    values |= _read_as(data, mode, f"{mode};16L", gray)
    return values


def _read_as(data: bytes, mode: str, raw_mode: str, gray: int | tuple[int, ...]) -> NDArray[Any]:
    reader = Reader(data)
    image = Image.open(reader, formats=("PNG",))
    reader.left = BODY
    image._mode = mode
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        image.im = Image.new(mode, image.size, gray).im  # Pillow would start from black
    image.tile = [tile._replace(args=raw_mode) for tile in image.tile]
    return np.asarray(image)
