"""Camera raw files, developed by LibRaw with fixed settings, so that equal light gives equal pixels."""

from __future__ import annotations

import io
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinocli.data.decode.extras import RAW
from dinocli.data.decode.raster import ArrayFile, UnfitArray, picture_layout

# Raw files that do not look like a TIFF: of Fujifilm, Olympus, Panasonic, Sigma and Minolta. Canon's come below.
_BEGINNINGS = (b"FUJIFILMCCD-RAW", b"IIRO", b"IIRS", b"MMOR", b"IIU\0", b"FOVb", b"\0MRM")
# LibRaw brightens each picture by its own histogram, and even without that scales it by its brightest pixel.
DEVELOPED = {"use_camera_wb": True, "no_auto_bright": True, "adjust_maximum_thr": 0.0, "output_bps": 8}
_ON_ITS_SIDE = (5, 6)


def is_raw(data: bytes) -> bool:
    """Recognize a camera raw file that is not built like a TIFF."""
    return data.startswith(_BEGINNINGS) or data[6:14] == b"HEAPCCDR" or data[4:12] == b"ftypcrx "


def open_raw(data: bytes, channels: int) -> ArrayFile:
    """Read the header of a raw file. Its pixels are sRGB with the camera's white balance, and upright already.

    Raises:
        UnfitArray: If the extra `raw` is not installed, or `channels` is neither 1 nor 3.
    """
    try:
        rawpy = import_module("rawpy")
    except ImportError as error:
        raise UnfitArray(f"not read here: a camera's raw file; {RAW.pip}") from error
    layout = picture_layout("a camera's raw file", 3, (0.0, 255.0), channels)
    file: Any = _call(rawpy, lambda: rawpy.imread(io.BytesIO(data)))
    height, width = int(file.sizes.iheight), int(file.sizes.iwidth)
    if file.sizes.flip in _ON_ITS_SIDE:
        height, width = width, height

    def read() -> NDArray[Any]:
        values: NDArray[Any] = _call(rawpy, lambda: file.postprocess(**DEVELOPED))
        return values

    return ArrayFile("RAW", height, width, 3, np.dtype(np.uint8), layout, read)


def _call(rawpy: Any, work: Callable[[], Any]) -> Any:
    try:
        return work()
    except rawpy.LibRawFileUnsupportedError as error:
        raise UnfitArray("not read here: a camera's raw file of a kind that LibRaw does not know") from error
    except rawpy.LibRawError as error:  # its text is bytes
        text = error.args[0] if error.args else b""
        raise ValueError(f"LibRaw: {text.decode() if isinstance(text, bytes) else text}") from error
