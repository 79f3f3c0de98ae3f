"""Pages of a TIFF: their places in the file, and each as a TIFF of its own."""

from __future__ import annotations

import io
import re
import struct
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dinocli.data.decode.bit_depth import Layout
from dinocli.data.decode.raster import MISSING, ArrayFile, UnfitArray, other_channels
from dinocli.data.decode.tiff_tags import Content, Directory, page_offsets

_DESCRIPTION, _COMPRESSION, _STRIPS, _TILES, _OLD_JPEG = 270, 259, (273, 279), (324, 325), 513
# Tags that point to other directories, or describe all pages and not this one.
_DROPPED = (_DESCRIPTION, 330, 34665, 34853, 40965, 50838, 50839)


class Page(NamedTuple):
    """Place of a page.

    Attributes:
        at: Offset of its directory.
        further: Number of pages after it whose pixels follow without a directory, as ImageJ writes them.
    """

    at: int
    further: int = 0


def pages_of(data: Content) -> list[Page]:
    """Return the pages of a TIFF, without thumbnails and masks; empty for corrupt files."""
    try:
        first = Directory(data)
        places = [Page(at) for at in page_offsets(data, first)]
        if len(places) == 1 and first.one(_COMPRESSION, 1) == 1 and (count := _imagej_count(data, first)) > 1:
            return [Page(first.at, further) for further in range(count)]
        return places
    except (struct.error, ValueError, OverflowError):
        return []


def _imagej_count(data: Content, first: Directory) -> int:
    """Return the number of pictures that ImageJ's description states, for files with one directory for all."""
    found = re.match(rb"ImageJ=.*?images=(\d{1,9})\b", first.raw(_DESCRIPTION), re.DOTALL)
    size = sum(first.numbers(_STRIPS[1]))
    return min(int(found[1]), len(data) // size) if found and size else 1


def cut_page(data: Content, page: Page, most: float) -> bytes:
    """Return a page as a TIFF of its own: its tags, strips and tiles, moved together.

    Args:
        data: Content of the file, for instance a memory map. Only the parts of the page are read.
        page: Place of the page.
        most: Largest accepted size in bytes.

    Raises:
        UnfitArray: If the page is larger, or stored as JPEG of the first kind, whose tables have no size.
        ValueError: If the file is corrupt.
    """
    tags = Directory(data, page.at)
    entries = [entry for entry in tags.tags.values() if entry.tag not in _DROPPED]
    if _OLD_JPEG in tags.tags:
        raise UnfitArray("not read here: a page of JPEG of the first kind (compression 6); rewrite it with deflate")
    offsets_tag, counts_tag = _TILES if _TILES[0] in tags.tags else _STRIPS
    offsets, counts = tags.numbers(offsets_tag), tags.numbers(counts_tag)
    if sum(counts) > most:
        raise UnfitArray(f"too large: a page of {sum(counts) / 1e6:.4g} megabytes, over {most / 1e6:g}")
    offsets = [offset + page.further * sum(counts) if offset else 0 for offset in offsets]

    order, room = tags.order, 8 if tags.big else 4
    count_form, entry_form = ("Q", "HHQ") if tags.big else ("H", "HHI")
    start = 16 if tags.big else 8
    tail = start + struct.calcsize(order + count_form) + len(entries) * (4 + 2 * room) + room
    rows, parts = [], list[bytes]()

    def put(part: bytes) -> int:
        nonlocal tail
        parts.append(part + bytes(len(part) % 2))  # offsets are even
        tail += len(parts[-1])
        return tail - len(parts[-1])

    moved = [
        put(bytes(data[offset : offset + count])) if offset and count else 0
        for offset, count in zip(offsets, counts, strict=False)
    ]
    for entry in sorted(entries):
        kind, length, values = entry.kind, entry.length, tags.raw(entry.tag)
        if entry.tag == offsets_tag:
            kind, length = (16, len(moved)) if tags.big else (4, len(moved))
            values = struct.pack(f"{order}{length}{'Q' if tags.big else 'I'}", *moved)
        if len(values) > room:
            values = struct.pack(order + ("Q" if tags.big else "I"), put(values))
        rows.append(struct.pack(order + entry_form, entry.tag, kind, length) + values.ljust(room, b"\0"))
    head = bytes(data[: 8 if tags.big else 4]) + struct.pack(order + ("Q" if tags.big else "I"), start)
    return b"".join([head, struct.pack(order + count_form, len(rows)), *rows, bytes(room), *parts])


def plane_groups(path: str, channels: int) -> list[list[int]]:
    """Return the page numbers, from 1, whose planes are the channels of each picture in a stack.

    A channel axis that OME or ImageJ state is used; otherwise, consecutive pages are the channels.

    Raises:
        UnfitArray: If the pages are not grey, or their number is no multiple of `channels`; or without tifffile.
    """
    try:
        import tifffile
    except ImportError as error:
        raise UnfitArray(f"not read here: planes of a TIFF {MISSING}") from error
    with tifffile.TiffFile(path) as file:
        series = file.series[0]
        axes, shape = str(series.axes), tuple(int(n) for n in series.shape)
    if not axes.endswith("YX"):
        raise UnfitArray(f"other channels: pages with the axes {axes}; expected grey planes")
    stack = np.arange(1, 1 + int(np.prod(shape[:-2]))).reshape(shape[:-2])
    if "C" in axes:
        stack = np.moveaxis(stack, axes.index("C"), -1)
    planes = stack.shape[-1] if "C" in axes else stack.size
    if planes % channels or ("C" in axes and planes != channels):
        raise UnfitArray(other_channels(f"{planes} planes", channels))
    groups: list[list[int]] = stack.reshape(-1, channels).tolist()
    return groups


def open_planes(pages: list[bytes], channels: int) -> ArrayFile:
    """Return grey pages of one size as the channels of one picture.

    Raises:
        UnfitArray: If their number is not `channels`, or they differ in size or depth.
    """
    if len(pages) != channels:
        raise UnfitArray(other_channels(f"{len(pages)} planes", channels))
    import tifffile

    def values(data: bytes) -> NDArray[np.generic]:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            return np.asarray(file.pages[0].asarray(maxworkers=1))

    planes = [values(data) for data in pages]
    if len({(plane.shape, plane.dtype) for plane in planes}) > 1 or planes[0].ndim != 2:
        raise UnfitArray("other channels: planes of different sizes or depths; expected grey planes of one size")
    stack = np.stack(planes, -1)
    top = float(np.iinfo(stack.dtype).max) if stack.dtype.kind == "u" and stack.dtype.itemsize < 4 else None
    layout = Layout("bands", None if top is None else (0.0, top))
    height, width, bands = stack.shape
    return ArrayFile("TIFF", height, width, bands, stack.dtype, layout, lambda: stack)
