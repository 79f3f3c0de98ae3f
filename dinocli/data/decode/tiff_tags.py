"""TIFF tags: the image file directories of a file, and the facts they state about its first picture."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from mmap import mmap
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dinocli.data.decode.bit_depth import Alpha

Content: TypeAlias = "bytes | mmap"
SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
ALPHAS: dict[tuple[int, ...], Alpha] = {(1,): "premultiplied", (2,): "straight"}  # by the tag ExtraSamples
_FORMS = {1: "B", 2: "B", 3: "H", 4: "I", 6: "b", 7: "B", 8: "h", 9: "i", 13: "I", 16: "Q", 17: "q", 18: "Q"}
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_ENTRIES = 4096  # per directory
_MOST = 2_000_000  # values per tag
_PAGES = 100_000
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER, _OFFSETS = 256, 257, 258, 259, 262, 266, 273
_ORIENTATION, _SAMPLES, _ROWS, _COUNTS, _HIGHEST, _PLANAR, _PREDICTOR = 274, 277, 278, 279, 281, 284, 317
_COLORS, _TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_COUNTS, _BELOW, _INKS, _EXTRA = 320, 322, 323, 324, 325, 330, 332, 338
_FORMAT, _SUBSAMPLING, _KIND, _DEPTH, _RAW = 339, 530, 254, 32997, 50706
_SMALLER, _MASK = 1, 4  # bits of NewSubfileType
_SENSOR = (32803, 34892)  # photometrics of camera raw files
_NAMES = {0: "white as zero", 1: "black as zero", 2: "RGB", 3: "a palette", 5: "inks", 6: "YCbCr", 8: "Lab"}


class Entry(NamedTuple):
    """Entry of a directory: tag, type and number of its values, and the place of the values or of their offset."""

    tag: int
    kind: int
    length: int
    at: int


class Directory:
    """Image file directory: the tags of one picture.

    Args:
        data: Content of a TIFF or BigTIFF file.
        at: Offset of the directory. If None, the file's first one.

    Raises:
        struct.error: If the offset lies outside the file.
    """

    def __init__(self, data: Content, at: int | None = None) -> None:
        order, self.big = "<" if data[:2] == b"II" else ">", 43 in data[2:4]
        self._data, self.order, self._offset = data, order, order + ("Q" if self.big else "I")
        self._entry, self._size = (order + "HHQ", 20) if self.big else (order + "HHI", 12)
        self._room = 8 if self.big else 4  # bytes for values, or for their offset
        if at is None:
            (at,) = struct.unpack_from(self._offset, data, self._room)
        (self._entries,) = struct.unpack_from(order + ("Q" if self.big else "H"), data, at)
        self.at, self._start = at, at + (8 if self.big else 2)

    def entries(self, most: int) -> Iterator[Entry]:
        """Yield the first `most` entries as far as they lie within the file. A corrupt file may repeat a tag."""
        within = (len(self._data) - self._start + self._room) // self._size  # the last value may be cut off
        for number in range(min(self._entries, most, within)):
            at = self._start + number * self._size
            tag, kind, length = struct.unpack_from(self._entry, self._data, at)
            yield Entry(tag, kind, length, at + self._size - self._room)

    @cached_property
    def tags(self) -> dict[int, Entry]:
        """First entry of each tag."""
        entries = list(self.entries(_ENTRIES))
        if len(entries) < min(self._entries, _ENTRIES):
            raise ValueError("the file ends within its tags")
        return {entry.tag: entry for entry in reversed(entries)}

    def values(self, tag: int) -> NDArray[Any] | None:
        """Return the numbers of a tag; None if it is missing or not numeric.

        Raises:
            ValueError: If they lie beyond the end of the file.
        """
        _, kind, count, at = self.tags.get(tag, Entry(tag, 0, 0, 0))
        form = _FORMS.get(kind)
        if not form or not 0 < count <= _MOST:
            return None
        dtype = np.dtype(self.order + form)
        if count * dtype.itemsize > self._room:
            (at,) = struct.unpack_from(self._offset, self._data, at)
        if at + count * dtype.itemsize > len(self._data):
            raise ValueError("a tag points beyond the end of the file")
        return np.frombuffer(self._data, dtype, count, at)

    def raw(self, tag: int) -> bytes:
        """Return the bytes of a tag's values; empty if it is missing or of an unknown type.

        Raises:
            ValueError: If they lie beyond the end of the file.
        """
        _, kind, count, at = self.tags.get(tag, Entry(tag, 0, 0, 0))
        size = count * _SIZES.get(kind, 0)
        if size > self._room:
            (at,) = struct.unpack_from(self._offset, self._data, at)
        if at + size > len(self._data):
            raise ValueError("a tag points beyond the end of the file")
        return bytes(self._data[at : at + size])

    def numbers(self, tag: int) -> list[int]:
        """Return all integers of a tag; none if it is missing or not numeric."""
        values = self.values(tag)
        return [] if values is None else [int(value) for value in values.tolist()]

    def one(self, tag: int, otherwise: int) -> int:
        """Return the first number of a tag, or `otherwise` if it is missing or not numeric."""
        values = self.values(tag)
        return otherwise if values is None else int(values[0])

    def next(self) -> int:
        """Return the offset of the next directory, 0 after the last one."""
        (at,) = struct.unpack_from(self._offset, self._data, self._start + self._size * self._entries)
        return int(at)


@dataclass(frozen=True)
class Facts:
    """Tags of a TIFF's first picture, with the format's defaults for missing ones."""

    order: str
    big: bool
    width: int
    height: int
    samples: int
    bits: tuple[int, ...]
    format: int
    photometric: int
    planar: int
    compression: int
    predictor: int
    fill_order: int
    orientation: int
    depth: int
    extra: tuple[int, ...] | None
    highest: int | None
    inks: int
    subsampling: tuple[int, ...]
    colors: NDArray[np.uint8] | None
    piece: tuple[int, int]
    offsets: NDArray[np.int64]
    counts: NDArray[np.int64]
    pages: int
    raw: bool

    @property
    def alpha(self) -> Alpha:
        """Kind of opacity in the first band after the colors; empty if the file states none."""
        return ALPHAS.get((self.extra or ())[:1], "")

    @property
    def words(self) -> str:
        """Layout in words, for errors."""
        kind = {2: "signed ", 3: "float "}.get(self.format, "")
        bits = "/".join(map(str, sorted(set(self.bits))))
        planes = " in planes" if self.planar == 2 and self.samples > 1 else ""
        name = _NAMES.get(self.photometric, f"photometric {self.photometric}")
        bands = f"{self.samples} bands" if self.samples > 1 else "1 band"
        return f"a TIFF of {bands} of {bits} {kind}bits{planes}, {name}, compression {self.compression}"


def read_facts(data: bytes) -> Facts | None:
    """Read the tags of a TIFF's first picture; None for other files and corrupt tags."""
    if data[:4] not in SIGNATURES:
        return None
    try:
        return _read_facts(data)
    except (struct.error, ValueError, OverflowError):
        return None


def _read_facts(data: bytes) -> Facts:
    tags = Directory(data)
    samples, width, height = tags.one(_SAMPLES, 1), tags.one(_WIDTH, 0), tags.one(_HEIGHT, 0)
    bits = tuple(int(bit) for bit in _first(tags.values(_BITS), 1, 64))
    extra, highest, formats = tags.values(_EXTRA), tags.values(_HIGHEST), tags.values(_FORMAT)
    tiled = _TILES in tags.tags
    piece = (
        (tags.one(_TILE_WIDTH, width), tags.one(_TILE_HEIGHT, height))
        if tiled
        else (width, min(height, tags.one(_ROWS, height)))
    )
    offsets, counts = (tags.values(tag) for tag in ((_TILES, _TILE_COUNTS) if tiled else (_OFFSETS, _COUNTS)))
    none = np.empty(0, np.int64)
    return Facts(
        order=tags.order,
        big=tags.big,
        width=width,
        height=height,
        samples=samples,
        bits=bits * samples if len(bits) == 1 and samples < 65 else bits,
        format=0 if formats is not None and len(set(formats.tolist())) > 1 else int(_first(formats, 1, 1)[0]),
        photometric=tags.one(_PHOTOMETRIC, 1),
        planar=tags.one(_PLANAR, 1),
        compression=tags.one(_COMPRESSION, 1),
        predictor=tags.one(_PREDICTOR, 1),
        fill_order=tags.one(_FILL_ORDER, 1),
        orientation=tags.one(_ORIENTATION, 1),
        depth=tags.one(_DEPTH, 1),
        extra=None if extra is None else tuple(extra[:64].tolist()),
        highest=None if highest is None else int(highest[0]),
        inks=tags.one(_INKS, 1),
        subsampling=tuple(_first(tags.values(_SUBSAMPLING), 2, 2).tolist()),
        colors=_colors(tags.values(_COLORS)),
        piece=piece,
        offsets=none if offsets is None else offsets.astype(np.int64),
        counts=none if counts is None else counts.astype(np.int64),
        pages=len(page_offsets(data, tags)),
        raw=_is_raw(data, tags),
    )


def _first(values: NDArray[Any] | None, otherwise: int, most: int) -> NDArray[Any]:
    return np.array([otherwise] * (2 if most == 2 else 1)) if values is None else values[:most]


def _colors(values: NDArray[Any] | None) -> NDArray[np.uint8] | None:
    """Return the color map in 8 bits. Some writers store 8 bits already, which libtiff's tools detect too. [N, 3]"""
    if values is None or len(values) % 3:
        return None
    colors = values.astype(np.float64).reshape(3, -1).T
    return (colors if colors.max() < 256 else np.minimum(colors / 257 + 0.5, 255)).astype(np.uint8)


def page_offsets(data: Content, first: Directory) -> list[int]:
    """Return the offsets of the pictures' directories, without reduced versions and masks of others."""
    seen, pages = {first.at}, [first.at]
    try:
        at = first.next() if first.at else 0
        while at and at not in seen and len(seen) < _PAGES:
            seen.add(at)
            tags = Directory(data, at)
            pages += [] if tags.one(_KIND, 0) & (_SMALLER | _MASK) else [at]
            at = tags.next()
    except (struct.error, ValueError):
        pass  # the first one may still be read
    return pages


def _is_raw(data: bytes, tags: Directory) -> bool:
    """Check for a camera's raw file, whose first picture is often a thumbnail."""
    if _RAW in tags.tags or data[8:10] == b"CR" or tags.one(_PHOTOMETRIC, 1) in _SENSOR:
        return True
    below = tags.values(_BELOW)
    try:
        return any(
            Directory(data, at).one(_PHOTOMETRIC, 1) in _SENSOR for at in ([] if below is None else below[:16].tolist())
        )
    except (struct.error, ValueError):
        return False
