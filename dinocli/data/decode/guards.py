"""Guards against files that are too large, or take very long to read."""

from __future__ import annotations

import io

from PIL import ImageFile

from dinocli.data.decode.pixels import BadImage
from dinocli.data.decode.tiff_tags import Directory
from dinocli.data.images import ImagesConfig

# Budgets of Pillow's Python loops: one unit per read and per 64 bytes. A header takes under a second, a body about ten.
_HEADER, BODY = 100_000, 12_000_000
_SCANS = 4000  # JPEG scans times megapixels: each scan covers the whole picture, and a few bytes make one
_VALUES = 590_000  # per TIFF tag, each a Python object: the number of 16x16 tiles in 150 megapixels
_ENTRIES = 65536  # of a TIFF directory
_QOI = 2e6  # pixels, which take Pillow about ten seconds
_SUB_BLOCKS = 100_000  # of a GIF, 255 bytes each, that are read to count its frames


class TooSlow(Exception):
    """Error for a file that would take too long to read."""


class Reader(io.BytesIO):
    """File with a reading budget: millions of chunks, segments or junk bytes must not stall a run."""

    left = _HEADER

    def read(self, size: int | None = -1, /) -> bytes:
        part = super().read(size)
        self.left -= 1 + (min(len(part), 65536) >> 6)
        if self.left < 0:
            raise TooSlow
        return part


def check_tags(data: bytes) -> None:
    """Refuse a TIFF with too many values in a tag.

    Raises:
        TooSlow: If a tag has too many values.
        struct.error: If the file ends before its tags.
    """
    for entry in Directory(data).entries(_ENTRIES):
        # Bytes and text stay one object. A count that exceeds the file is not read.
        if _VALUES < entry.length <= len(data) and entry.kind not in (1, 2, 6, 7):
            raise TooSlow


def size_fault(size: tuple[int, int], images: ImagesConfig) -> BadImage | None:
    """Refuse a picture of `size` (width, height) beyond the limits of `[images]`; None if it is within them."""
    short, long = sorted(size)
    words = f"{size[0]}x{size[1]} pixels are"
    if long * short > images.max_megapixels * 1e6:
        return BadImage(f"too large: {words} over {images.max_megapixels:g} megapixels")
    if long > images.max_aspect * short:
        return BadImage(f"too long: {words} over {images.max_aspect:g} to 1")
    return BadImage(f"too small: {words} under {images.min_side} per side") if short < images.min_side else None


def slow_fault(image: ImageFile.ImageFile, data: bytes) -> BadImage | None:
    """Refuse a picture whose format and size make Pillow take very long; None if it is quick enough."""
    if image.format == "QOI" and image.width * image.height > _QOI:
        return BadImage(f"too slow: {image.width}x{image.height} pixels of QOI, which Pillow decodes one by one")
    said = too_many_scans(image, data)
    return BadImage(said) if said else None


def too_many_scans(image: ImageFile.ImageFile, data: bytes) -> str:
    """Return the reason to refuse a JPEG with too many scans; empty if there is none."""
    if image.format not in ("JPEG", "MPO") or not image.fp:
        return ""
    # If the first scan has all bands, as in nearly all photos, libjpeg reads only that one.
    bands, end = len(image.getbands()), image.fp.tell()
    first = data[max(0, end - 8 - 2 * bands) : end - 3 - 2 * bands]
    if "progressive" not in image.info and first == bytes([0xFF, 0xDA, 0, 6 + 2 * bands, bands]):
        return ""
    scans = data.count(b"\xff\xda")
    slow = scans * (1 + image.width * image.height / 1e6) > _SCANS
    return f"too slow: {scans} scans of {image.width}x{image.height} pixels" if slow else ""


def gif_frames(data: bytes) -> int:
    """Count the frames of a GIF; in a very large file, only the first ones."""
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
