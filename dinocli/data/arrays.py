"""Images of any number of channels that Pillow does not read: NumPy's .npy files, and TIFFs of many bands."""

from __future__ import annotations

import io
import logging
import struct
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

_LONGEST_HEADER = 10_000  # bytes of a .npy; it is a line of text
_SAMPLES, _BITS = 277, 258  # tags of a TIFF
_NUMBERS = {3: "H", 4: "I", 16: "Q"}  # kinds of a TIFF's tag that hold such a number


logging.getLogger("tifffile").addHandler(logging.NullHandler())  # else its words come out on stderr


class UnfitArray(Exception):
    """An array that is no image as it was wanted; a category to count by, a colon, a few words."""


@dataclass(frozen=True)
class ArrayFile:
    """A file of which only the header was read.

    Attributes:
        format: `NPY` or `TIFF`.
        height: In pixels.
        width: In pixels.
        dtype: Of its numbers.
        read: Reads them. [H, W, C]
    """

    format: str
    height: int
    width: int
    dtype: np.dtype[Any]
    read: Callable[[], NDArray[Any]]


def open_array(data: bytes, channels: int) -> ArrayFile | None:
    """Read the header of a .npy, or of a TIFF that Pillow cannot give with all its bands and bits.

    Args:
        data: The file.
        channels: How many are wanted.

    Returns:
        What can be read; None where the file is neither, and Pillow's to read.

    Raises:
        UnfitArray: It has another number of channels, or holds no numbers.
        ValueError: It is damaged; or any other exception that the TIFF's reader has.
    """
    if data.startswith(npy.MAGIC_PREFIX):
        return _open_npy(data, channels)
    facts = _tiff_facts(data)
    if facts is None:
        return None
    samples, bits = facts
    # What Pillow reads of these is what was always read; it knows no more than four bands, and 8 bits of each.
    if samples <= 4 and (samples != channels or channels in (1, 3) or bits <= 8):
        return None
    if samples != channels:
        raise UnfitArray(other_channels(f"{samples}", channels))
    return _open_tiff(data, channels)


def other_channels(came: str, wanted: int) -> str:
    """Why a file of another number of channels is refused."""
    return f"other channels: {came}, where images.channels is {wanted}"


def _open_npy(data: bytes, channels: int) -> ArrayFile:
    file = io.BytesIO(data)
    try:
        version = npy.read_magic(file)
        read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, by_columns, dtype = read_header(file, max_header_size=_LONGEST_HEADER)
    except ValueError as error:
        raise EOFError("it ends within its header") if file.tell() == len(data) else error from None
    if dtype.hasobject or dtype.kind not in "uif":
        what = "objects, which would be unpickled" if dtype.hasobject else f"{dtype}"
        raise UnfitArray(f"no image: an array of numbers was wanted; it holds {what}")
    last = _channels_last(shape, channels)
    height, width = shape[:2] if last else shape[1:]

    def read() -> NDArray[Any]:
        count, start = int(np.prod(shape, dtype=object)), file.tell()
        if len(data) - start < count * dtype.itemsize:
            raise EOFError(f"{len(data) - start} bytes of numbers where {count * dtype.itemsize} were to be")
        values = np.frombuffer(data, dtype, count, start).reshape(shape, order="F" if by_columns else "C")
        values = values[..., None] if len(shape) == 2 else values
        return values if last else values.transpose(1, 2, 0)

    return ArrayFile("NPY", height, width, dtype, read)


def _channels_last(shape: tuple[int, ...], channels: int) -> bool:
    """Whether an array is [H, W, C] and not [C, H, W]; [H, W] has one channel. Where both fit it is the first.

    Raises:
        UnfitArray: It is neither with so many channels.
    """
    if len(shape) == 2 and channels == 1:
        return True
    if len(shape) == 3 and channels in (shape[2], shape[0]):
        return shape[2] == channels
    raise UnfitArray(other_channels(f"an array of {'x'.join(map(str, shape)) or 'one number'}", channels))


def _tiff_facts(data: bytes) -> tuple[int, int] | None:
    """Bands and bits of a TIFF's first picture; None of other files, and of what is too damaged to tell.

    Pillow says of a TIFF of five bands only that it knows no such image.
    """
    if data[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return None
    order, big = "<" if data[:2] == b"II" else ">", 43 in data[2:4]
    found = {_SAMPLES: 1, _BITS: 1}
    try:
        (at,) = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)
        (entries,) = struct.unpack_from(order + ("Q" if big else "H"), data, at)
        at, size, room = (at + 8, 20, 8) if big else (at + 2, 12, 4)
        for entry in range(at, at + size * min(entries, 4096), size):
            tag, kind, count = struct.unpack_from(order + ("HHQ" if big else "HHI"), data, entry)
            if tag in found and count and kind in _NUMBERS:
                form, value = _NUMBERS[kind], entry + size - room
                if count * struct.calcsize(form) > room:  # there lies then where they are
                    (value,) = struct.unpack_from(order + ("Q" if big else "I"), data, value)
                (found[tag],) = struct.unpack_from(order + form, data, value)
    except struct.error:
        return None
    return found[_SAMPLES], found[_BITS]


def _open_tiff(data: bytes, channels: int) -> ArrayFile:
    try:
        tifffile = import_module("tifffile")
    except ImportError as error:
        raise UnfitArray("not read here: a TIFF of many bands needs pip install 'dinocli[tiff]'") from error
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages[0]
        height, width, axes, dtype = int(page.imagelength), int(page.imagewidth), str(page.axes), page.dtype
    if axes not in ("YXS", "SYX") or dtype is None or dtype.kind not in "uif":
        raise UnfitArray(f"no image: bands of numbers were wanted; it holds {dtype} along {axes}")

    def read() -> NDArray[Any]:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            values: NDArray[Any] = file.pages[0].asarray(maxworkers=1)
        return values if axes == "YXS" else values.transpose(1, 2, 0)

    return ArrayFile("TIFF", height, width, dtype, read)
