"""Stored values of a mask file of any depth, its palette, and its format if lossy."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError

from dinocli.data.decode.colors import orientation
from dinocli.data.decode.guards import BODY, Reader, TooSlow, check_tags
from dinocli.data.decode.pixels import BadImage
from dinocli.data.decode.tiff_tags import SIGNATURES
from dinocli.data.decode.turns import turned
from dinocli.data.images import DEFAULTS
from dinocli.data.sources.regular import read_file, why_unread

_FORMATS = tuple("PNG TIFF BMP DIB GIF PPM WEBP JPEG MPO JPEG2000 AVIF PSD PCX SGI SUN TGA".split())
_LOSSY = {"JPEG": "JPEG", "MPO": "JPEG", "JPEG2000": "JPEG 2000", "WEBP": "WebP", "AVIF": "AVIF"}
# TIFF compression tags that change no value: none, fax, LZW, deflate, PackBits, LZMA, Zstandard.
_EXACT = {1, 2, 3, 4, 5, 8, 32771, 32773, 32946, 34925, 50000}
_ORIENTATION = 274  # TIFF tag
_TOO_LARGE = f"too large: over {DEFAULTS.max_megapixels:g} megapixels"
_NUMBERS = "object numbers (a palette, or 8-bit grey)"


@dataclass(frozen=True)
class MaskValues:
    """Mask as stored in its file.

    Attributes:
        values: Integers or floats of any depth; indices if there is a palette. [H, W]
        palette: Red, green and blue of each index. None if the file has no palette.
        lossy: Name of the format if it may have changed values; otherwise empty.
    """

    values: NDArray[Any]
    palette: bytes | None = None
    lossy: str = ""


def read_values(path: Path) -> MaskValues | BadImage:
    """Read the values of a mask: palette indices, or grey of 1 to 32 bits or floats, even if saved as colors."""
    try:
        data = read_file(path)
    except OSError as error:
        return BadImage(why_unread(error))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tifffile = _tifffile() if data[:4] in SIGNATURES else None
            return _read_with_tifffile(data, tifffile) if tifffile else _read_with_pillow(data)
    except Image.DecompressionBombError:
        return BadImage(_TOO_LARGE)
    except UnidentifiedImageError:
        return BadImage("damaged: unknown image format")  # Pillow's message holds a memory address
    except TooSlow:
        return BadImage("too slow: more pieces than an image needs")
    # Readers raise nearly every kind of exception on a corrupt file.
    except Exception as error:
        return BadImage(f"damaged: {' '.join(str(error).split())[:160] or type(error).__name__}")


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)  # the installed Pillow may read fewer


@cache
def _tifffile() -> Any:
    """Return tifffile, which reads every TIFF exactly; None, to fall back to Pillow, if it is not installed."""
    try:
        import_module("imagecodecs")
        return import_module("tifffile")
    except ImportError:
        return None


def _read_with_pillow(data: bytes) -> MaskValues | BadImage:
    with Image.open(Reader(data), formats=_formats()) as image:
        if image.width * image.height > DEFAULTS.max_megapixels * 1e6:
            return BadImage(_TOO_LARGE)
        # Pillow keeps only the upper 8 bits of deep colors in PNG and others, which turns small numbers into 0.
        deep = not image.mode.startswith("I;16") and any(";16" in str(tile.args) for tile in image.tile)
        if deep and len(image.getbands()) > 1:
            return BadImage("no label map: its colors have 16 bits; save the mask as grey")
        scale = _ppm_scale(image)
        if isinstance(reader := image.fp, Reader):
            reader.left = BODY
        image.load()
        lossy = _LOSSY.get(image.format or "", "")
        if image.format == "WEBP" and (data[12:16] == b"VP8L" or (data[12:16] == b"VP8X" and b"VP8L" in data)):
            lossy = ""
        if image.format == "TIFF" and image.info.get("compression") in ("jpeg", "tiff_jpeg", "webp"):
            lossy = f"TIFF with {image.info['compression']} compression"
        if image.mode == "P":
            palette = image.getpalette()
            found = MaskValues(np.array(image), bytes(palette) if palette else None, lossy)
        elif image.mode in ("1", "L", "I", "F") or image.mode.startswith("I;16"):
            values = np.array(image.convert("L") if image.mode == "1" else image)
            found = MaskValues(values if scale is None else np.round(values * scale).astype(np.int64), lossy=lossy)
        elif image.mode in ("LA", "RGB", "RGBA"):
            flat = _flat(np.array(image), alpha=image.mode != "RGB", kind=image.mode)
            if isinstance(flat, BadImage):
                return flat
            found = MaskValues(flat, lossy=lossy)
        else:
            return BadImage(f"no label map: its pixels are {image.mode}; expected {_NUMBERS}")
        return MaskValues(turned(found.values, orientation(image)), found.palette, found.lossy)


def _ppm_scale(image: ImageFile.ImageFile) -> float | None:
    """Return the factor from Pillow's values back to the stored ones, for a PGM with its own maximum."""
    if image.format != "PPM" or not image.tile or not image.tile[0].codec_name.startswith("ppm"):
        return None
    args = image.tile[0].args
    if not isinstance(args, tuple) or len(args) < 2 or not isinstance(args[1], int):
        return None
    return args[1] / (65535 if image.mode == "I" else 255)


def _read_with_tifffile(data: bytes, tifffile: Any) -> MaskValues | BadImage:
    import io

    check_tags(data)
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages[0]
        if page.imagewidth * page.imagelength > DEFAULTS.max_megapixels * 1e6:
            return BadImage(_TOO_LARGE)
        kind, axes, photometric = f"{page.samplesperpixel} bands", page.axes, int(page.photometric)
        if axes not in ("YX", "YXS", "SYX") or page.samplesperpixel > 4 or photometric not in (0, 1, 2, 3, 6):
            return BadImage(f"no label map: its pixels are {kind}; expected {_NUMBERS}")
        values = page.asarray(maxworkers=1)
        bits, tag, colors = int(page.bitspersample), page.tags.get(_ORIENTATION), page.colormap
        name = getattr(page.compression, "name", str(page.compression))
        lossy = "" if int(page.compression) in _EXACT else f"TIFF with {name} compression"
    if axes != "YX":
        bands = values if axes == "YXS" else values.transpose(1, 2, 0)
        flat = _flat(bands, alpha=bands.shape[2] in (2, 4), kind=kind)
        if isinstance(flat, BadImage):
            return flat
        values = flat
    if values.dtype == np.bool_:
        values = np.where(values, np.uint8(255), np.uint8(0))
    if photometric == 0 and values.dtype.kind == "u":  # white is zero
        values = (255 if bits == 1 else 2**bits - 1) - values
    palette = None
    if photometric == 3 and colors is not None:
        palette = (np.asarray(colors).T.astype(np.int64) // 257).astype(np.uint8).tobytes()
    return MaskValues(turned(values, int(tag.value) if tag else 1), palette, lossy)


def _flat(bands: NDArray[Any], *, alpha: bool, kind: str) -> NDArray[Any] | BadImage:
    """Return the grey values of a mask saved as colors or with alpha. [H, W, S] -> [H, W]"""
    colors = bands[..., :-1] if alpha else bands
    if (colors != colors[..., :1]).any():
        return BadImage(f"no label map: its pixels are {kind}; expected {_NUMBERS}")
    values = np.ascontiguousarray(colors[..., 0])
    opaque = np.iinfo(bands.dtype).max if bands.dtype.kind in "ui" else 1
    if alpha and (lost := int(((bands[..., -1] < opaque) & (values != 0)).sum())):
        return BadImage(f"no label map: {lost} of its pixels are transparent and not 0; save the mask without alpha")
    return values
