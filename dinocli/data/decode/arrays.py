"""Images with raw values: NumPy's .npy files, and formats that Pillow does not read at full depth."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from dinocli.data.decode import heic, jxl
from dinocli.data.decode.bit_depth import Layout
from dinocli.data.decode.dicom import is_dicom, open_dicom
from dinocli.data.decode.jpeg2000 import is_jpeg2000, open_jpeg2000
from dinocli.data.decode.png import open_png
from dinocli.data.decode.pnm import open_pnm
from dinocli.data.decode.raster import ArrayFile, UnfitArray, other_channels
from dinocli.data.decode.raw import is_raw, open_raw
from dinocli.data.decode.unread import brand_of
from dinocli.data.images import ImagesConfig

_LONGEST_HEADER = 10_000  # bytes of a .npy header, which is a line of text
_SGI = b"\x01\xda"


def open_array(data: bytes, images: ImagesConfig) -> ArrayFile | None:
    """Open a .npy, camera raw, DICOM, HEIC or JPEG XL, or a PNG, PNM, SGI or JPEG 2000 that Pillow reads too shallow.

    Returns:
        The header; None if Pillow should read the file.

    Raises:
        UnfitArray: If the number of channels does not fit `images.channels`, or the array holds no numbers.
        ValueError: If the file is corrupt.
    """
    if data.startswith(npy.MAGIC_PREFIX):
        return _open_npy(data, images.channels)
    if data[:1] == b"P":
        return open_pnm(data, images.channels, images.truncated)
    if data[:1] == b"\x89":
        return open_png(data, images.channels)
    if is_raw(data):
        return open_raw(data, images.channels)
    if is_dicom(data):
        return open_dicom(data, images)
    if data[:2] == _SGI:
        return _open_sgi(data, images.channels)
    if data[4:8] == b"ftyp":
        return heic.open_heic(data, images.channels) if brand_of(data) in heic.BRANDS else None
    if data.startswith(jxl.SIGNATURES):
        return jxl.open_jxl(data, images)
    return open_jpeg2000(data, images.channels, images.max_megapixels) if is_jpeg2000(data) else None


def _open_npy(data: bytes, channels: int) -> ArrayFile:
    file = io.BytesIO(data)
    try:
        version = npy.read_magic(file)
        read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, by_columns, dtype = read_header(file, max_header_size=_LONGEST_HEADER)
    except ValueError as error:
        raise EOFError("the file ends within its header") if file.tell() == len(data) else error from None
    if dtype.hasobject or dtype.kind not in "uif":
        what = "objects, which would be unpickled" if dtype.hasobject else f"{dtype}"
        raise UnfitArray(f"no image: the array holds {what}; expected numbers")
    last = _channels_last(shape, channels)
    height, width = shape[:2] if last else shape[1:]

    def read() -> NDArray[Any]:
        count, start = int(np.prod(shape, dtype=object)), file.tell()
        if len(data) - start < count * dtype.itemsize:
            raise EOFError(f"{len(data) - start} bytes of numbers; expected {count * dtype.itemsize}")
        # A copy, since torch warns of the read-only memory of bytes.
        values = np.frombuffer(data, dtype, count, start).copy().reshape(shape, order="F" if by_columns else "C")
        values = values[..., None] if len(shape) == 2 else values
        return values if last else values.transpose(1, 2, 0)

    stated = (0.0, 65535.0) if dtype.kind == "u" and dtype.itemsize == 2 else None
    return ArrayFile("NPY", height, width, channels, dtype, Layout("bands", stated), read)


def _channels_last(shape: tuple[int, ...], channels: int) -> bool:
    """Return True for [H, W, C] and one-channel [H, W], False for [C, H, W]. If both fit, channels are last.

    Raises:
        UnfitArray: If none of them has `channels` channels.
    """
    if len(shape) == 2 and channels == 1:
        return True
    if len(shape) == 3 and channels in (shape[2], shape[0]):
        return shape[2] == channels
    raise UnfitArray(other_channels(f"an array of {'x'.join(map(str, shape)) or 'one number'}", channels))


def _open_sgi(data: bytes, channels: int) -> ArrayFile | None:
    """Read the header of a 16-bit SGI. Pillow keeps only the upper 8 bits."""
    if len(data) < 512 or data[3] != 2:
        return None
    packed, _, dimensions, width, height, bands = struct.unpack_from(">BBHHHH", data, 2)
    bands, height = bands if dimensions > 2 else 1, height if dimensions > 1 else 1
    if channels not in (1, 3) and bands != channels:
        raise UnfitArray(other_channels(f"{bands} (SGI)", channels))
    if packed or bands not in (1, 3, 4):
        raise UnfitArray("not read here: 16-bit SGI with packed rows; convert it to 16-bit PNG")

    def read() -> NDArray[Any]:
        if len(data) < 512 + 2 * width * height * bands:
            raise EOFError("image file is truncated")
        values = np.frombuffer(data, ">u2", width * height * bands, 512)
        return values.reshape(bands, height, width).transpose(1, 2, 0)[::-1]  # rows are stored bottom to top

    if channels in (1, 3):
        layout = Layout("gray" if bands == 1 else "rgb", (0, 65535), alpha="straight" if bands == 4 else "")
    else:
        layout = Layout("bands", (0, 65535))
    return ArrayFile("SGI", height, width, bands, np.dtype(">u2"), layout, read)
