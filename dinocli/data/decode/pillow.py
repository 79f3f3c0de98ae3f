"""Guards around Pillow: the formats that it may open, its settings while decoding, and its errors as reasons."""

from __future__ import annotations

import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

from PIL import Image, ImageFile, UnidentifiedImageError

from dinocli.data.decode.guards import Reader, TooSlow
from dinocli.data.decode.pixels import UNKNOWN_FORMAT, BadImage
from dinocli.data.decode.raster import UnfitArray
from dinocli.data.images import ImagesConfig

T = TypeVar("T")
# Pixel formats only. EPS starts Ghostscript. PDF and WMF hold drawings, FITS, HDF5 and GRIB measurements. PCD, IMT,
# IPTC and McIdas accept nearly any bytes. IM, SPIDER and TGA have no signature, so they come last.
_FORMATS = tuple(
    "JPEG PNG WEBP GIF TIFF BMP DIB AVIF JPEG2000 PPM ICO CUR ICNS PSD PCX DCX DDS SGI SUN QOI MSP XBM XPM PIXAR "
    "FTEX GBR BLP FLI XVTHUMB IM SPIDER TGA".split()
)
_EARLY = re.compile("truncat|not (large )?enough|expected to read|end of file", re.IGNORECASE)
_ENTERING = threading.Lock()
_inside: list[tuple[int | None, bool]] = []  # Pillow's settings before decoding, once per decoding thread


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)  # the installed Pillow may read fewer


def read_header(data: bytes) -> ImageFile.ImageFile:
    """Open a file with the formats that are accepted, without decoding its pixels.

    Raises:
        Exception: Any kind, if the file is corrupt; `decode_or_reason` converts it to a reason.
    """
    return Image.open(Reader(data), formats=_formats())


@contextmanager
def silence_libtiff() -> Iterator[None]:
    """Silence libtiff, which prints to stderr about corrupt files. The fault is returned as a value."""
    try:
        ours, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    except OSError:  # no stderr
        yield
        return
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(ours, 2)
        os.close(ours)
        os.close(nowhere)


@contextmanager
def _pillow(images: ImagesConfig, lenient: bool) -> Iterator[None]:
    """Apply our pixel limit to Pillow, for frames and icons within a file too, and silence its warnings."""
    # Pillow's settings are global to the process: the last thread to leave restores what the first one found.
    with _ENTERING:
        found = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
        _inside.append(_inside[0] if _inside else found)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Image.MAX_IMAGE_PIXELS = int(images.max_megapixels * 1e6 / 2)  # Pillow raises only above twice this
            ImageFile.LOAD_TRUNCATED_IMAGES = lenient
            yield
    finally:
        with _ENTERING:
            found = _inside.pop()
            if not _inside:
                Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = found


def decode_or_reason(images: ImagesConfig, lenient: bool, work: Callable[[], T]) -> T | BadImage:
    """Return the result of `work`, which decodes with Pillow, or the reason why it failed."""
    try:
        with _pillow(images, lenient):
            return work()
    except UnfitArray as error:
        return BadImage(str(error))
    except UnidentifiedImageError:
        return BadImage(UNKNOWN_FORMAT)  # Pillow's message holds a memory address
    except Image.DecompressionBombError:
        return BadImage(f"too large: over {images.max_megapixels:g} megapixels")
    except MemoryError:
        return BadImage("too large: not enough memory")
    except TooSlow:
        return BadImage("too slow: more pieces than an image needs")
    # Pillow's readers raise nearly every kind of exception on a corrupt file, SyntaxError and struct.error too.
    except Exception as error:
        words = re.sub(r" at 0x[0-9a-f]+|[^ -~]+", " ", str(error))[:160].strip() or type(error).__name__
        early = isinstance(error, EOFError) or _EARLY.search(words)
        return BadImage(f"{'truncated' if early else 'damaged'}: {words}")
