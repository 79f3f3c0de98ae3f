"""Bytes to pixels: uint8, upright, RGB or grey whatever the file's mode; a bad file is a value and not a crash."""

from __future__ import annotations

import logging
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError

from dinocli.data.arrays import ArrayFile, UnfitArray, open_array, other_channels
from dinocli.data.depth import array_to_bytes, deep_to_gray, is_deep_color, read_ppm, windowed
from dinocli.data.guards import BODY, Reader, TooSlow, check_tags, too_many_scans
from dinocli.data.images import DEFAULTS, ImagesConfig
from dinocli.data.jpeg import plain_header
from dinocli.data.turns import TURNS, turned

logging.getLogger("PIL").addHandler(logging.NullHandler())  # else its words on bad files come out on stderr

Pixels = NDArray[np.uint8]
T = TypeVar("T")

# Only what holds pixels. EPS starts Ghostscript, PDF and WMF draw, FITS, HDF5 and GRIB hold measurements, and PCD, IMT,
# IPTC or McIdas take nearly any bytes for an image. IM, SPIDER and TGA have no signature, so they come last.
_FORMATS = tuple(
    "JPEG PNG WEBP GIF TIFF BMP DIB AVIF JPEG2000 PPM ICO CUR ICNS PSD PCX DCX DDS SGI SUN QOI MSP XBM XPM PIXAR "
    "FTEX GBR BLP FLI XVTHUMB IM SPIDER TGA".split()
)
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_ORIENTATION = 0x0112
_QOI = 2e6  # pixels; some ten seconds
_HOLD_ORIENTATION = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}
# Channels of what is not made RGB or grey. RGBX is what Pillow calls four bands of which it knows three.
_BANDS = {"LA": 2, "RGBA": 4, "RGBX": 4}
_ENTERING = threading.Lock()
_inside: list[tuple[int | None, bool]] = []  # what Pillow was set to, for each thread that reads
_NO_NUMBER = "damaged: none of its values is a number"
_GREY: dict[str, Any] = {"L": 128, "RGB": (128,) * 3, "RGBA": (128, 128, 128, 255), "I;16": 32768}


@dataclass(frozen=True)
class BadImage:
    """A file that could not be read as an image, and why: a category to count by, a colon, a few words."""

    reason: str


class Opened:
    """An image of which only the header was read.

    Attributes:
        height: In pixels, upright.
        width: In pixels, upright.
        format: As Pillow names it, or `NPY`; absent of what came decoded.
        mode: Pillow's, of the file's pixels, or of one channel of an array: `I;16` is deep, `L` grey.
    """

    def __init__(
        self,
        source: bytes | Image.Image,
        images: ImagesConfig,
        size: tuple[int, int],
        *,
        format: str | None = "JPEG",
        mode: str,
        image: Image.Image | None = None,
        array: ArrayFile | None = None,
        turn: int = 1,
        tagged: bool = False,
        plain_jpeg: bool = True,
    ) -> None:
        self._source, self._images, self._size = source, images, size
        self._image, self._turn, self._tagged, self._plain_jpeg = image, turn, tagged, plain_jpeg
        self._array = array
        self.width, self.height = size[::-1] if turn > 4 else size
        self.format, self.mode = format, mode

    def pixels(self, reduce: int = 1) -> Pixels | BadImage:
        """Decode.

        Args:
            reduce: 1, 2, 4 or 8: JPEGs are decoded at 1/reduce of their size, rounded up, which is faster; all others
                at full size. So look at the shape of what you get; an icon or a PNG may also have lied in its header.

        Returns:
            [H, W, C], or the reason why not.
        """
        if self._array:
            return _tried(self._images, False, self._array_pixels)
        if self._plain_jpeg and reduce == 1 and self._images.channels in (1, 3):
            fast = _fast_jpeg(self._source, self._tagged)
            if fast is not None and fast.shape[1::-1] == self._size:
                return turned(_gray(fast) if self._images.channels == 1 else fast, self._turn)
        image, self._image = self._image, None  # Pillow reads a file once
        result = _tried(self._images, False, lambda: self._load(image, reduce))
        if isinstance(result, BadImage) and self._images.truncated and isinstance(self._source, bytes):
            return _tried(self._images, True, lambda: self._load(None, reduce))
        return result

    def _array_pixels(self) -> Pixels | BadImage:
        assert self._array
        pixels = array_to_bytes(self._array.read(), self._images.windows)
        return BadImage(_NO_NUMBER) if pixels is None else pixels

    def _load(self, image: Image.Image | None, reduce: int) -> Pixels | BadImage:
        lenient = ImageFile.LOAD_TRUNCATED_IMAGES
        if isinstance(self._source, Image.Image):
            image = self._source
        else:
            image = image or _header(self._source)
            if reduce > 1:
                image.draft(None, (max(1, image.width // reduce), max(1, image.height // reduce)))
            if isinstance(reader := getattr(image, "fp", None), Reader):
                reader.left = BODY
        if lenient and image.mode in _GREY and image.format in ("PNG", "BMP", "TIFF", "PPM", "TGA"):
            image.im = Image.new(image.mode, image.size, _GREY[image.mode]).im  # Pillow would begin with black
        windows, channels = self._images.windows, self._images.channels
        deep = windows is not None and isinstance(image, ImageFile.ImageFile) and is_deep_color(image)
        if isinstance(image, ImageFile.ImageFile) and isinstance(self._source, bytes):
            image = read_ppm(image, self._source, windows) or image
        with _hushed() if image.format == "TIFF" else nullcontext():
            image.load()
        # What an icon holds is known only now.
        if image.size != self._size and reduce == 1 and (fault := _size_fault(image.size, self._images)):
            return fault
        pixels = _to_rgb(image, windows, channels) if channels in (1, 3) else _as_it_is(image, channels)
        if deep and windows is not None and not isinstance(pixels, BadImage):
            exact = _deep_png(self._source, pixels.shape[2]) if image.format == "PNG" else None
            # Of other color files Pillow has only the upper 8 bits to tell: the window is right, its steps are coarse.
            pixels = windowed(pixels, windows / 257) if exact is None else windowed(exact, windows)
        if channels == 1 and not isinstance(pixels, BadImage) and pixels.shape[2] == 3:
            pixels = _gray(pixels)
        if lenient and not isinstance(pixels, BadImage) and (pixels == pixels[:1, :1]).all():
            return BadImage("truncated: nothing is left of the picture")
        return pixels if isinstance(pixels, BadImage) else turned(pixels, orientation(image))


def reduction(room: float) -> int:
    """How many times smaller an image may be decoded which may be made `room` times smaller: 8, 4, 2 or 1."""
    return next((r for r in (8, 4, 2) if room >= r), 1)


def open_image(data: bytes | Image.Image, images: ImagesConfig = DEFAULTS) -> Opened | BadImage:
    """Read the header of an image file and hold it against the limits, before anything of its size is allocated.

    EXIF orientation is applied; transparency is laid on white, where three channels or one are wanted; 16-bit values
    are scaled by `images.window` or their bit depth, 32-bit and float by the usual range that holds them; of an
    animation the first frame is taken.

    Returns:
        What knows its size and can be decoded, or the reason why not; no bytes make it raise.
    """
    # Most photos need no more than this, and of all else Pillow knows what to say.
    if isinstance(data, bytes) and len(data) <= images.max_megabytes * 1e6:
        plain = plain_header(data)
        if plain and not _size_fault(plain.size, images):
            return Opened(data, images, plain.size, mode=plain.mode)
    return _tried(images, False, lambda: _open(data, images))


def decode(data: bytes | Image.Image, images: ImagesConfig = DEFAULTS) -> Pixels | BadImage:
    """Decode an image file as `open_image` says. [H, W, C], or the reason why not."""
    opened = open_image(data, images)
    return opened if isinstance(opened, BadImage) else opened.pixels()


def _open(data: bytes | Image.Image, images: ImagesConfig) -> Opened | BadImage:
    if isinstance(data, Image.Image):
        return _size_fault(data.size, images) or _opened(data, data, images)
    if not data:
        return BadImage("empty: the file has no bytes")
    if len(data) > images.max_megabytes * 1e6:
        return BadImage(f"too large: {len(data) / 1e6:.0f} megabytes, over {images.max_megabytes:g}")
    if data[:4] in _TIFF:
        check_tags(data)
    if array := open_array(data, images.channels):
        return _opened_array(data, array, images)
    image = _header(data)
    return _size_fault(image.size, images) or _slow_fault(image, data) or _opened(data, image, images)


def _opened(source: bytes | Image.Image, image: Image.Image, images: ImagesConfig) -> Opened:
    # Of these every libjpeg makes the same; CMYK and Adobe's RGB are Pillow's.
    plain = image.mode == "L" or (image.mode == "RGB" and image.info.get("adobe_transform", 1) == 1)
    return Opened(
        source,
        images,
        image.size,
        format=image.format,
        mode=image.mode,
        image=image,
        turn=orientation(image),
        tagged=bool(_HOLD_ORIENTATION & image.info.keys()),
        plain_jpeg=plain and image.format in ("JPEG", "MPO") and isinstance(source, bytes),
    )


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)  # this Pillow may know fewer


def _opened_array(data: bytes, array: ArrayFile, images: ImagesConfig) -> Opened | BadImage:
    size = (array.width, array.height)
    if array.width * array.height * images.channels > 3 * images.max_megapixels * 1e6:  # a bound of memory
        what = f"{size[0]}x{size[1]} pixels of {images.channels} channels"
        return BadImage(f"too large: {what} are over {images.max_megapixels:g} megapixels of three")
    mode = "F" if array.dtype.kind == "f" else "L" if array.dtype.itemsize == 1 else "I"
    return _size_fault(size, images) or Opened(
        data, images, size, format=array.format, mode=mode, array=array, plain_jpeg=False
    )


def _header(data: bytes) -> ImageFile.ImageFile:
    return Image.open(Reader(data), formats=_formats())


def _slow_fault(image: ImageFile.ImageFile, data: bytes) -> BadImage | None:
    if image.format == "QOI" and image.width * image.height > _QOI:
        return BadImage(f"too slow: {image.width}x{image.height} pixels of a QOI, which Pillow reads one by one")
    said = too_many_scans(image, data)
    return BadImage(said) if said else None


def _size_fault(size: tuple[int, int], images: ImagesConfig) -> BadImage | None:
    short, long = sorted(size)
    words = f"{size[0]}x{size[1]} pixels are"
    if long * short > images.max_megapixels * 1e6:
        return BadImage(f"too large: {words} over {images.max_megapixels:g} megapixels")
    if long > images.max_aspect * short:
        return BadImage(f"too long: {words} over {images.max_aspect:g} to 1")
    return BadImage(f"too small: {words} under {images.min_side} a side") if short < images.min_side else None


@cache
def _jpeg_decoder(tagged: bool) -> Callable[[Any], Any] | None:
    """The fastest libjpeg, 1.2 instead of Pillow's 1.6 ms a photo: from bytes as a tensor to a [3, H, W] tensor.

    Args:
        tagged: The file may hold an orientation. torchcodec would obey it, and we turn all files ourselves.
    """
    try:
        import_module("torchvision.io")
        # Its Python face says at each call that torchcodec comes after it. Until then they are equally fast.
        native = import_module("torch").ops.image.decode_jpeg
        return lambda data: native(data, 3, False)
    except Exception:  # absent, or made for another torch: OSError and RuntimeError too
        try:
            return None if tagged else import_module("torchcodec.decoders").decode_jpeg
        except Exception:
            return None


def has_fast_jpeg() -> bool:
    """Whether JPEGs are decoded by torch's libraries; Pillow does it where they are absent."""
    return _jpeg_decoder(False) is not None


def _fast_jpeg(data: Any, tagged: bool) -> Pixels | None:
    if not (decoder := _jpeg_decoder(tagged)):
        return None
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch: the bytes are not writable
            return decoder(torch.from_numpy(np.frombuffer(data, np.uint8))).permute(1, 2, 0).numpy()
    except Exception:  # Pillow has the last word
        return None


def _deep_png(data: Any, channels: int) -> NDArray[np.uint16] | None:
    """A color PNG's 16 bits, with or without alpha, where torchvision is there to read them. [H, W, 3 or 4]"""
    try:
        import_module("torchvision.io")
        torch = import_module("torch")
        values = torch.ops.image.decode_png(torch.frombuffer(bytearray(data), dtype=torch.uint8), channels, False)
        return values.permute(1, 2, 0).numpy() if values.dtype == torch.uint16 else None
    except Exception:  # Pillow's upper 8 bits will do
        return None


@contextmanager
def _hushed() -> Iterator[None]:
    """Without the lines that libtiff writes of its own about a damaged file; what is wrong comes back as a value."""
    try:
        ours, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    except OSError:  # there is none
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
    """Pillow with our limit, which it then also holds against frames and icons within a file, and without warnings."""
    # Pillow's settings are of the whole process: the last thread to leave puts back what the first one found.
    with _ENTERING:
        found = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
        _inside.append(_inside[0] if _inside else found)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Image.MAX_IMAGE_PIXELS = int(images.max_megapixels * 1e6 / 2)  # it warns above, and refuses above twice
            ImageFile.LOAD_TRUNCATED_IMAGES = lenient
            yield
    finally:
        with _ENTERING:
            found = _inside.pop()
            if not _inside:
                Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = found


def _tried(images: ImagesConfig, lenient: bool, work: Callable[[], T]) -> T | BadImage:
    try:
        with _pillow(images, lenient):
            return work()
    except UnfitArray as error:
        return BadImage(str(error))
    except UnidentifiedImageError:
        return BadImage("not an image: no format that is known here")  # its own words hold a memory address
    except Image.DecompressionBombError:
        return BadImage(f"too large: over {images.max_megapixels:g} megapixels")
    except MemoryError:
        return BadImage("too large: not enough memory")
    except TooSlow:
        return BadImage("too slow: more pieces than a picture needs")
    # Pillow's readers raise nearly every kind of exception on a broken file: SyntaxError and struct.error too.
    except Exception as error:
        words = re.sub(r" at 0x[0-9a-f]+|[^ -~]+", " ", str(error))[:160].strip() or type(error).__name__
        early = isinstance(error, EOFError) or re.search("truncat|not (large )?enough|expected to read", words, re.I)
        return BadImage(f"{'truncated' if early else 'damaged'}: {words}")


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation that Pillow has not applied itself; 1 if there is none."""
    # Pillow turns TIFFs itself.
    if image.format == "TIFF" or not _HOLD_ORIENTATION & image.info.keys():
        return 1
    try:
        turn = Image.Image.getexif(image).get(_ORIENTATION)  # that of PNG decodes the picture
    except Exception:  # nobody refuses a picture for its EXIF
        return 1
    return turn if isinstance(turn, int) and turn in TURNS else 1


def _to_rgb(image: Image.Image, windows: NDArray[np.float64] | None, channels: int) -> Pixels | BadImage:
    """Colors; where one channel is wanted, greys that are there as such stay one. [H, W, 3 or 1]"""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        ranges = [None] if windows is None else [(low, high) for low, high in np.unique(windows, axis=0).tolist()]
        if windows is not None and len(ranges) > 1:
            ranges = [(low, high) for low, high in windows.tolist()]
        gray = [deep_to_gray(image, each) for each in ranges]
        if gray[0] is None:
            return BadImage(_NO_NUMBER)
        return np.repeat(gray[0][..., None], channels, -1) if len(gray) == 1 else np.stack(gray, -1)  # type: ignore[arg-type]
    if image.has_transparency_data:
        image = _on_white(image.convert("RGBA"))
    if channels == 1 and image.mode == "L":
        return np.array(image)[..., None]
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _gray(pixels: Pixels) -> Pixels:
    """The brightness of colors, as Pillow weighs them. [H, W, 3] -> [H, W, 1]"""
    return np.array(Image.fromarray(pixels).convert("L"))[..., None]


def _as_it_is(image: Image.Image, channels: int) -> Pixels | BadImage:
    """All bands of an image that has so many, alpha too. [H, W, C]"""
    if image.mode in ("P", "PA") and image.has_transparency_data:  # a palette has as many as its colors
        image = image.convert("RGBA")
    # CMYK is none of these: four inks make three colors.
    if _BANDS.get(image.mode) != channels:
        return BadImage(other_channels(f"{len(image.getbands())} ({image.mode})", channels))
    return np.array(image)


def _on_white(image: Image.Image) -> Image.Image:
    flat = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if np.min(flat.getextrema()) < 255:
        return flat
    # White on white: what was drawn in white is laid on black, and an alpha that was never filled in is left away.
    if image.getchannel("A").getextrema() == (0, 0):
        colors = image.convert("RGB")
        return colors if np.ptp(colors.getextrema(), axis=1).any() else flat
    return Image.alpha_composite(Image.new("RGBA", image.size, "black"), image).convert("RGB")
