"""Images within a file, each with a name of its own: `stack.tif#page=3`."""

from __future__ import annotations

import mmap
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from dinocli.data.decode import tiff_pages
from dinocli.data.decode.dicom import count_frames, open_dicom
from dinocli.data.decode.extras import HDF5, MEDICAL, SLIDES, VIDEO, VOLUMES, extra_for
from dinocli.data.decode.nifti import count_slices, open_slice
from dinocli.data.decode.pillow import decode_or_reason
from dinocli.data.decode.pixels import BadImage, Data
from dinocli.data.decode.raster import UnfitArray
from dinocli.data.decode.slides import count_levels, open_tile, tile_corners
from dinocli.data.decode.stored_arrays import count_rows, read_row
from dinocli.data.decode.tiff_tags import SIGNATURES
from dinocli.data.decode.video import frame_times, read_frame
from dinocli.data.images import DEFAULTS, ImagesConfig
from dinocli.data.sources.kinds import kind_of, looks_like_dicom
from dinocli.data.sources.regular import Refused, begins_with, check_file, read_file

_PART = re.compile(r"(.+)#(page|planes|time|tile|row)=([0-9.,]+)", re.DOTALL)
_TIFF = frozenset({".tif", ".tiff"})
_STORED = 64  # files whose table of pages each process remembers
_THREADS = 8  # files opened at once to count their parts


class Holder(NamedTuple):
    """Kind of file that holds images only if a setting says so.

    Attributes:
        suffixes: Suffixes of the files.
        setting: Setting that takes the images, and what it reads.
        taken: Function that checks whether the settings take them.
        parts: Function that yields the parts of a file, such as `page=1`.
    """

    suffixes: frozenset[str]
    setting: str
    taken: Callable[[ImagesConfig], bool]
    parts: Callable[[str, ImagesConfig], Iterator[str]]


class Part(NamedTuple):
    """Name of an image within a file.

    Attributes:
        file: Path of the file.
        kind: Kind of part, such as `page`.
        value: Place of the part in the file; pages count from 1.
    """

    file: str
    kind: str
    value: str


def part_of(name: str) -> Part | None:
    """Return the parts of a name like `stack.tif#page=3`; None for the name of a file."""
    found = _PART.fullmatch(name) if "#" in name else None
    return Part(*found.groups()) if found else None


def holder_of(name: str) -> Holder | None:
    """Return the kind of a file that holds images only by a setting, if its extra is installed."""
    kind = kind_of(name)
    found = next((holder for holder in _HOLDERS if kind in holder.suffixes), None)
    extra = extra_for(kind) if found else None
    return found if extra is None or extra.installed else None


def _may_hold(name: str) -> bool:
    """Return True if a file of this name may hold several images."""
    kind = kind_of(name)
    return kind in _TIFF or kind in ("", *MEDICAL.suffixes) or holder_of(name) is not None


def read_image(path: str | os.PathLike[str], images: ImagesConfig = DEFAULTS) -> Data:
    """Read the image of a name: the bytes of a file, or one of several images in it.

    Raises:
        Refused: If the file is too large, or does not have the part.
        OSError: If the file does not exist, or permission is denied.
    """
    text = os.fspath(path)
    part = part_of(text)
    if part is None or os.path.exists(text):  # the name of a file may hold a #
        if part is None and (holder := holder_of(text)) and holder.taken(images):
            part = Part(text, "", "")  # its parts could not be counted, and counting again gives the reason
        else:
            return read_file(text, images)
    check_file(part.file)
    found = decode_or_reason(images, False, lambda: _READERS[part.kind](*part[::2], images))
    if isinstance(found, BadImage):
        raise Refused(found.reason)
    return found


def expand(
    root: str | os.PathLike[str], names: Sequence[str], images: ImagesConfig
) -> tuple[list[tuple[int, str]], dict[str, Counter[str]]]:
    """List the images in files.

    A file that cannot be read keeps its name, so that reading it gives the reason.

    Args:
        root: Folder that the names are relative to.
        names: Names of files.
        images: Settings that say which files hold several images.

    Returns:
        The index of the file and the name of each image in it, in order; and the number of files by suffix that no
        setting takes, by the setting that would.
    """
    found: list[tuple[int, str]] = []
    missed: dict[str, Counter[str]] = {}
    rows = [row for row, name in enumerate(names) if _may_hold(name)]
    with ThreadPoolExecutor(_THREADS) as pool:
        parts = dict(zip(rows, pool.map(lambda row: _parts(root, names[row], images), rows), strict=True))
    for row, name in enumerate(names):
        some = parts.get(row)
        holder = holder_of(name) if row in parts and not some and not part_of(name) else None
        if holder and not holder.taken(images):
            missed.setdefault(holder.setting, Counter())[kind_of(name)] += 1
        else:
            found += [(row, f"{name}#{part}") for part in some] if some else [(row, name)]
    return found, missed


def _parts(root: str | os.PathLike[str], name: str, images: ImagesConfig) -> list[str]:
    """Return the parts of a file, such as `page=1`; empty if it is one image."""
    kind = kind_of(name)
    if part_of(name):
        return []
    listed = None
    if holder := holder_of(name):
        listed = holder.parts if holder.taken(images) else None
    elif images.tile and kind in _TIFF and _is_pyramid(os.path.join(root, name)):
        listed = _tile_parts
    elif images.pages != "first" and kind in _TIFF:
        listed = _page_parts
    elif images.pages == "all" and kind in ("", *MEDICAL.suffixes):
        listed = _frame_parts
    if listed is None:
        return []
    path = os.path.join(root, name)
    found = decode_or_reason(images, False, lambda: list(listed(path, images)))
    return [] if isinstance(found, BadImage) else found


def _map(path: str) -> mmap.mmap:
    """Map a regular file of any size into memory: only the parts that are used are read.

    Raises:
        OSError: If it cannot be opened, or is empty or not regular.
    """
    with open(path, "rb") as file:
        try:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as error:
            raise Refused("empty: the file has no bytes") from error


@lru_cache(_STORED)
def _pages(path: str, changed: int) -> list[tiff_pages.Page]:
    return tiff_pages.pages_of(_map(path))


def _page_parts(path: str, images: ImagesConfig) -> Iterator[str]:
    pages = _pages(path, os.stat(path).st_mtime_ns)
    if images.pages == "all":
        yield from (f"page={number}" for number in range(1, 1 + len(pages)) if len(pages) > 1)
    elif len(pages) > 1:
        for group in tiff_pages.plane_groups(path, images.channels):
            yield f"planes={','.join(map(str, group))}"


def _frame_parts(path: str, images: ImagesConfig) -> Iterator[str]:
    frames = count_frames(path) if looks_like_dicom(path) else 1
    yield from (f"page={number}" for number in range(1, 1 + frames) if frames > 1)


def _read_page(path: str, value: str, images: ImagesConfig) -> Data:
    if looks_like_dicom(path):
        data = read_file(path, images)
        frame = open_dicom(data, images, _number(value))
        return replace(frame, pages=1) if frame else data  # no page of it is lost, so none is reported
    if kind_of(path) in VOLUMES.suffixes:
        return open_slice(path, _number(value), images.channels)
    return _cut(path, [value], images)[0]


def _read_planes(path: str, value: str, images: ImagesConfig) -> Data:
    return tiff_pages.open_planes(_cut(path, value.split(","), images), images.channels)


def _cut(path: str, values: Sequence[str], images: ImagesConfig) -> list[bytes]:
    pages, data = _pages(path, os.stat(path).st_mtime_ns), _map(path)
    if data[:4] not in SIGNATURES:
        raise UnfitArray("not read here: pages of a file other than TIFF, DICOM and NIfTI")
    numbers = [_number(value) for value in values]
    if wrong := next((value for value, n in zip(values, numbers, strict=True) if not 0 < n <= len(pages)), None):
        raise UnfitArray(f"no such page: {wrong}; the file has pages 1 to {len(pages)}")
    return [tiff_pages.cut_page(data, pages[n - 1], images.max_megabytes * 1e6) for n in numbers]


def _slice_parts(path: str, images: ImagesConfig) -> Iterator[str]:
    yield from (f"page={number}" for number in range(1, 1 + count_slices(path)))


def _time_parts(path: str, images: ImagesConfig) -> Iterator[str]:
    yield from (f"time={_plain(time)}" for time in frame_times(path, images.every or 1))


def _plain(number: float) -> str:
    """Return a number with three digits after the point, without zeros at its end."""
    return f"{number:.3f}".rstrip("0").rstrip(".")


def _read_whole(path: str, value: str, images: ImagesConfig) -> Data:
    holder = holder_of(path)
    return read_file(path, images) if holder is None or list(holder.parts(path, images)) else b""


def _read_time(path: str, value: str, images: ImagesConfig) -> Data:
    return read_frame(path, float(value), images)


def _tile_parts(path: str, images: ImagesConfig) -> Iterator[str]:
    yield from (f"tile={x},{y}" for x, y in tile_corners(path, images.tile or 0, images.level))


def _read_tile(path: str, value: str, images: ImagesConfig) -> Data:
    x, y = (_number(part) for part in value.split(","))
    if images.tile is None:
        raise UnfitArray("not read here: a tile of no size; set images.tile")
    return open_tile(path, (x, y), images.tile, images.level, images.channels)


def _row_parts(path: str, images: ImagesConfig) -> Iterator[str]:
    yield from (f"row={row}" for row in range(count_rows(path, images.key)))


def _read_row(path: str, value: str, images: ImagesConfig) -> Data:
    return read_row(path, images.key, _number(value), images.max_megabytes * 1e6)


def is_tiff(name: str) -> bool:
    """Return True for the name of a TIFF, whose pages or tiles may be images."""
    return kind_of(name) in _TIFF


def _is_pyramid(path: str) -> bool:
    """Return True for a TIFF with reduced levels of its picture, as tiffslide reads them."""
    return SLIDES.installed and begins_with(path, SIGNATURES) and count_levels(path) > 1


def _number(value: str) -> int:
    return int(value) if value.isdecimal() else 0


_HOLDERS = (
    Holder(VOLUMES.suffixes, "images.pages=all reads their slices", lambda images: images.pages == "all", _slice_parts),
    Holder(VIDEO.suffixes, "images.every=1 reads a frame per second", lambda images: bool(images.every), _time_parts),
    Holder(SLIDES.suffixes, "images.tile=256 cuts them into tiles", lambda images: bool(images.tile), _tile_parts),
    Holder(
        HDF5.suffixes | {".npz"},
        "images.key=NAME reads the rows of that array",
        lambda images: bool(images.key),
        _row_parts,
    ),
)
_READERS: dict[str, Callable[[str, str, ImagesConfig], Data]] = {
    "": _read_whole,
    "page": _read_page,
    "planes": _read_planes,
    "time": _read_time,
    "tile": _read_tile,
    "row": _read_row,
}
