"""What a file may cost to read: guards against those made to take very long."""

from __future__ import annotations

import io
import struct

from PIL import ImageFile

# What a file may cost Pillow's Python loops, a unit a read and each 64 bytes of it: under a second, and some ten.
_HEADER, BODY = 100_000, 12_000_000
_SCANS = 4000  # of a JPEG, times its megapixels: each goes over the whole picture, and a few bytes make one
_VALUES = 590_000  # of a TIFF's tag: each becomes an object. A scan of 150 megapixels has so many tiles of 16x16
_SUB_BLOCKS = 100_000  # of a GIF, of 255 bytes each, that counting its frames looks at


class TooSlow(Exception):
    """Reading the file would take long, for what it is."""


class Reader(io.BytesIO):
    """A file that can be read for so long only: chunks, segments and junk by the million must not stop a run."""

    left = _HEADER

    def read(self, size: int | None = -1, /) -> bytes:
        part = super().read(size)
        self.left -= 1 + (min(len(part), 65536) >> 6)
        if self.left < 0:
            raise TooSlow
        return part


def check_tags(data: bytes) -> None:
    """Refuse a TIFF with tags of very many values.

    Raises:
        TooSlow: It has one.
        struct.error: It ends within its tags.
    """
    order = "<" if data[:2] == b"II" else ">"
    big = 43 in data[2:4]
    (at,) = struct.unpack_from(order + "Q", data, 8) if big else struct.unpack_from(order + "I", data, 4)
    (entries,) = struct.unpack_from(order + ("Q" if big else "H"), data, at)
    at, size = (at + 8, 20) if big else (at + 2, 12)
    for i in range(min(entries, (len(data) - at) // size, 65536)):
        _, kind, values = struct.unpack_from(order + ("HHQ" if big else "HHI"), data, at + i * size)
        # Bytes and text stay one object, and what the file cannot hold is not read.
        if _VALUES < values <= len(data) and kind not in (1, 2, 6, 7):
            raise TooSlow


def too_many_scans(image: ImageFile.ImageFile, data: bytes) -> str:
    """What is wrong with a JPEG that would be drawn over and over; empty where nothing is."""
    if image.format not in ("JPEG", "MPO") or not image.fp:
        return ""
    # Where the first scan has all the bands, as in nearly all photos, libjpeg reads no other.
    bands, end = len(image.getbands()), image.fp.tell()
    first = data[max(0, end - 8 - 2 * bands) : end - 3 - 2 * bands]
    if "progressive" not in image.info and first == bytes([0xFF, 0xDA, 0, 6 + 2 * bands, bands]):
        return ""
    scans = data.count(b"\xff\xda")
    slow = scans * (1 + image.width * image.height / 1e6) > _SCANS
    return f"too slow: {scans} scans of {image.width}x{image.height} pixels" if slow else ""


def gif_frames(data: bytes) -> int:
    """Count the frames of a GIF, those of a very large one in part."""
    frames, at = 0, 13 + (3 << ((data[10] & 7) + 1) if data[10:11] and data[10] & 128 else 0)
    left = _SUB_BLOCKS
    while at + 10 < len(data) and left > 0:
        if data[at] == 0x2C:
            frames += 1
            at += 11 + (3 << ((data[at + 9] & 7) + 1) if data[at + 9] & 128 else 0)
        elif data[at] == 0x21:
            at += 2
        else:
            break
        while at < len(data) and data[at] and left > 0:
            at, left = at + 1 + data[at], left - 1
        at += 1
    return max(1, frames)
