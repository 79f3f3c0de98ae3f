"""HEIC and HEIF photos, as phones write them."""

from __future__ import annotations

import io
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinocli.data.decode.raster import ArrayFile, picture_layout

BRANDS = {
    **dict.fromkeys((b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs"), "HEIC"),
    **dict.fromkeys((b"mif1", b"msf1", b"mif2"), "HEIF"),
}
_BANDS = {"L": 1, "I": 1, "LA": 2, "La": 2, "RGB": 3, "RGBA": 4, "RGBa": 4}


def open_heic(data: bytes, channels: int) -> ArrayFile | None:
    """Read the header of a HEIC or HEIF, at its primary picture; None if the extra `heic` is not installed.

    libheif applies the orientation itself and returns orientation 1, so it is not applied a second time.

    Raises:
        UnfitArray: If the number of channels does not fit `channels`.
        ValueError: If the file is corrupt.
    """
    try:
        heif: Any = import_module("pillow_heif")
    except ImportError:
        return None
    heif.options.DECODE_THREADS = 1  # the workers already use all cores
    file = heif.open_heif(io.BytesIO(data), convert_hdr_to_8bit=False)
    bits, mode = int(file.info.get("bit_depth", 8)), file.mode.partition(";")[0]
    width, height = file.size
    layout = picture_layout(
        "HEIC", _BANDS[mode], (0, 2**bits - 1), channels, "premultiplied" if mode.endswith("a") else "straight"
    )

    def read() -> NDArray[Any]:
        values = np.asarray(file)
        values = values[..., None] if values.ndim == 2 else values
        return values >> (16 - bits) if bits > 8 else values  # pillow-heif fills the upper bits

    dtype = np.dtype(np.uint16 if bits > 8 else np.uint8)
    return ArrayFile("HEIC", height, width, _BANDS[mode], dtype, layout, read, pages=len(file))
