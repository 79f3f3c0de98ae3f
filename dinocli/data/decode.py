"""Image decoding to upright uint8 pixels, RGB or grey for every file mode. A bad file gives a `BadImage`, no error."""

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

from dinocli.data.arrays import open_array
from dinocli.data.depth import image_layout, image_values, to_bytes
from dinocli.data.guards import BODY, Reader, TooSlow, check_tags, gif_frames, too_many_scans
from dinocli.data.images import DEFAULTS, ImagesConfig
from dinocli.data.jpeg import find_frame, plain_header
from dinocli.data.raster import ArrayFile, UnfitArray, other_channels
from dinocli.data.tiff import SIGNATURES, Facts, open_tiff
from dinocli.data.turns import TURNS, turned
from dinocli.data.unread import name_jpeg, name_unread

logging.getLogger("PIL").addHandler(logging.NullHandler())  # otherwise it prints messages about bad files to stderr

Pixels = NDArray[np.uint8]
T = TypeVar("T")

# Pixel formats only. EPS starts Ghostscript. PDF and WMF hold drawings, FITS, HDF5 and GRIB measurements. PCD, IMT,
# IPTC and McIdas accept nearly any bytes. IM, SPIDER and TGA have no signature, so they come last.
_FORMATS = tuple(
    "JPEG PNG WEBP GIF TIFF BMP DIB AVIF JPEG2000 PPM ICO CUR ICNS PSD PCX DCX DDS SGI SUN QOI MSP XBM XPM PIXAR "
    "FTEX GBR BLP FLI XVTHUMB IM SPIDER TGA".split()
)
_ORIENTATION = 0x0112
_QOI = 2e6  # pixels, which take Pillow about ten seconds
_HOLD_ORIENTATION = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}
_COUNTED = ("PNG", "WEBP", "AVIF", "DCX", "FLI", "IM", "SPIDER")  # their headers state the number of pictures
# Channels of modes that are read unconverted. RGBX has four bands, and Pillow knows the meaning of three.
_BANDS = {"LA": 2, "RGBA": 4, "RGBX": 4}
_ENTERING = threading.Lock()
_inside: list[tuple[int | None, bool]] = []  # Pillow's settings before decoding, once per decoding thread
_UNKNOWN = "not an image: unknown format"
_NO_NUMBER = "damaged: none of its values is a number"
_NOTHING_LEFT = "truncated: no pixels left"
_GREY: dict[str, Any] = {"L": 128, "RGB": (128,) * 3, "RGBA": (128, 128, 128, 255), "I;16": 32768}


@dataclass(frozen=True)
class BadImage:
    """Reason why a file could not be read as an image: a category for counting, a colon, a few words."""

    reason: str


class Opened:
    """Image file after reading only its header.

    Attributes:
        height: Height in pixels, upright.
        width: Width in pixels, upright.
        format: Pillow's name of the format, or `NPY`. None for an image that came decoded.
        mode: Pillow's mode of the pixels, or of one channel of an array. `I;16` is deep, `L` grey.
        pages: Number of pages or frames in the file. Only the first is read.
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
        palette: Pixels | None = None,
        turn: int = 1,
        tagged: bool = False,
        plain_jpeg: bool = True,
        pages: int = 1,
    ) -> None:
        self._source, self._images, self._size = source, images, size
        self._image, self._turn, self._tagged, self._plain_jpeg = image, turn, tagged, plain_jpeg
        self._array, self._palette = array, palette
        self.width, self.height = size[::-1] if turn > 4 else size
        self.format, self.mode, self.pages = format, mode, pages

    @property
    def deep(self) -> bool:
        """True if values have more than 8 bits."""
        return self.mode.startswith(("I", "F"))

    def pixels(self, reduce: int = 1) -> Pixels | BadImage:
        """Decode the image.

        Args:
            reduce: Factor 1, 2, 4 or 8 by which a JPEG is decoded smaller, rounded up, to save time. Other formats keep
                their size, so check the shape of the result. Headers of icons and PNGs may also state a wrong size.

        Returns:
            Pixels [H, W, C], or the reason for failure.
        """
        if self._array:
            found = _try(self._images, False, self._array_pixels)
            if isinstance(found, BadImage) and self._images.truncated and self.format == "PNG":
                return _try(self._images, True, self._array_pixels)
            return found
        if self._plain_jpeg and reduce == 1 and self._images.channels in (1, 3):
            fast = _fast_jpeg(self._source, self._tagged)
            if fast is not None and fast.shape[1::-1] == self._size:
                return turned(_gray(fast) if self._images.channels == 1 else fast, self._turn)
        image, self._image = self._image, None  # Pillow can load a file only once
        result = _try(self._images, False, lambda: self._load(image, reduce))
        if isinstance(result, BadImage) and self._images.truncated and isinstance(self._source, bytes):
            return _try(self._images, True, lambda: self._load(None, reduce))
        return result

    def _array_pixels(self) -> Pixels | BadImage:
        assert self._array
        channels = self._images.channels
        with _silence_libtiff() if self.format in ("TIFF", "JPEG2000") else nullcontext():
            values = self._array.read()
        pixels = to_bytes(values, self._array.layout, channels, self._images.windows)
        if pixels is None:
            return BadImage(_NO_NUMBER)
        pixels = _gray(pixels) if channels == 1 and pixels.shape[2] == 3 else pixels
        if ImageFile.LOAD_TRUNCATED_IMAGES and (pixels == pixels[:1, :1]).all():
            return BadImage(_NOTHING_LEFT)
        return turned(pixels, self._turn)

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
            image.im = Image.new(image.mode, image.size, _GREY[image.mode]).im  # Pillow would start from black
        windows, channels = self._images.windows, self._images.channels
        with _silence_libtiff() if image.format == "TIFF" else nullcontext():
            image.load()
        # The size of an icon is known only after loading.
        if image.size != self._size and reduce == 1 and (fault := _size_fault(image.size, self._images)):
            return fault
        if self._palette is not None and image.mode == "P":
            image = Image.fromarray(self._palette[np.minimum(np.asarray(image), len(self._palette) - 1)])
        pixels = _to_rgb(image, windows, channels) if channels in (1, 3) else _keep_channels(image, channels)
        if channels == 1 and not isinstance(pixels, BadImage) and pixels.shape[2] == 3:
            pixels = _gray(pixels)
        if lenient and not isinstance(pixels, BadImage) and (pixels == pixels[:1, :1]).all():
            return BadImage(_NOTHING_LEFT)
        return pixels if isinstance(pixels, BadImage) else turned(pixels, orientation(image))


def reduction(room: float) -> int:
    """Return the largest reduction (8, 4, 2 or 1) for decoding an image that may be made `room` times smaller."""
    return next((r for r in (8, 4, 2) if room >= r), 1)


def open_image(data: bytes | Image.Image, images: ImagesConfig = DEFAULTS) -> Opened | BadImage:
    """Read the header of an image file and check it against the limits, before memory for its pixels is allocated.

    Decoding applies the EXIF orientation. Transparency is composited on white if `images.channels` is 1 or 3. Deep
    values are scaled by `images.window`. By default, 16-bit values are scaled by their bit depth, 32-bit and float
    values by the smallest usual range that holds them. Only the first frame of an animation is read.

    Returns:
        The image, whose size is known and which can be decoded, or the reason for failure. No bytes make this raise.
    """
    # Fast path that is enough for most photos. Pillow judges all other files.
    if isinstance(data, bytes) and len(data) <= images.max_megabytes * 1e6:
        plain = plain_header(data)
        if plain and not _size_fault(plain.size, images):
            return Opened(data, images, plain.size, mode=plain.mode)
    opened = _try(images, False, lambda: _open(data, images))
    if isinstance(opened, BadImage) and opened.reason == _UNKNOWN and isinstance(data, bytes):
        return BadImage(name_unread(data))
    return opened


def decode(data: bytes | Image.Image, images: ImagesConfig = DEFAULTS) -> Pixels | BadImage:
    """Decode an image file as described in `open_image`. Return [H, W, C], or the reason for failure."""
    opened = open_image(data, images)
    return opened if isinstance(opened, BadImage) else opened.pixels()


def _open(data: bytes | Image.Image, images: ImagesConfig) -> Opened | BadImage:
    if isinstance(data, Image.Image):
        return _size_fault(data.size, images) or _describe(data, data, images)
    if not data:
        return BadImage("empty: the file has no bytes")
    if len(data) > images.max_megabytes * 1e6:
        return BadImage(f"too large: {len(data) / 1e6:.0f} megabytes, over {images.max_megabytes:g}")
    facts = None
    if data[:4] in SIGNATURES:
        check_tags(data)
        found = open_tiff(data, images.channels)
        if isinstance(found, ArrayFile):
            return _describe_array(data, found, images)
        facts = found
    elif array := open_array(data, images):
        return _describe_array(data, array, images)
    image = _header(data)
    fault = _size_fault(image.size, images) or _slow_fault(image, data) or _kind_fault(image, data, images)
    return fault or _describe(data, image, images, facts)


def _describe(
    source: bytes | Image.Image, image: Image.Image, images: ImagesConfig, facts: Facts | None = None
) -> Opened:
    # Every libjpeg decodes these equally. CMYK and Adobe's RGB are left to Pillow.
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
        palette=facts.colors if facts else None,
        pages=facts.pages if facts else _count_pages(image, source) if isinstance(source, bytes) else 1,
    )


def _count_pages(image: Image.Image, data: bytes) -> int:
    """Count frames if that is cheap. An MPO counts as one: its second picture is a preview or a depth map."""
    if image.format == "GIF":
        return gif_frames(data)
    return getattr(image, "n_frames", 1) if image.format in _COUNTED else 1


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)  # the installed Pillow may read fewer


def _describe_array(data: bytes, array: ArrayFile, images: ImagesConfig) -> Opened | BadImage:
    size, count = (array.width, array.height), max(images.channels, array.bands)
    if array.width * array.height * count > 3 * images.max_megapixels * 1e6:  # limits memory
        what = f"{size[0]}x{size[1]} pixels of {count} channels"
        return BadImage(f"too large: {what} are over {images.max_megapixels:g} megapixels of three channels")
    taken = array.width * array.height * array.bands * array.dtype.itemsize
    if taken > max(6 * images.max_megapixels * 1e6, len(data)):
        what = f"{size[0]}x{size[1]} pixels of {array.bands * array.dtype.itemsize} bytes each"
        return BadImage(f"too large: {what} are over {images.max_megapixels:g} megapixels of six bytes")
    mode = "F" if array.dtype.kind == "f" else "L" if array.dtype.itemsize == 1 else "I"
    turn, pages = array.turn, array.pages
    if array.format == "PNG" and not _size_fault(size, images):
        image = _header(data)
        turn, pages = orientation(image), _count_pages(image, data)
    return _size_fault(size, images) or Opened(
        data, images, size, format=array.format, mode=mode, array=array, turn=turn, plain_jpeg=False, pages=pages
    )


def _header(data: bytes) -> ImageFile.ImageFile:
    return Image.open(Reader(data), formats=_formats())


def _slow_fault(image: ImageFile.ImageFile, data: bytes) -> BadImage | None:
    if image.format == "QOI" and image.width * image.height > _QOI:
        return BadImage(f"too slow: {image.width}x{image.height} pixels of QOI, which Pillow decodes one by one")
    said = too_many_scans(image, data)
    return BadImage(said) if said else None


def _kind_fault(image: ImageFile.ImageFile, data: bytes, images: ImagesConfig) -> BadImage | None:
    """Refuse variants that Pillow mistakes for others, or reads with fewer bits than `images.window` refers to."""
    if image.format in ("JPEG", "MPO") and (frame := find_frame(data)) and not frame.is_common:
        return BadImage(name_jpeg(frame.kind, frame.bits))
    at = data.find(b"av1C", 0, 4096) if image.format == "AVIF" and images.window else -1
    if 0 < at < len(data) - 6 and data[at + 6] & 0x40:
        return BadImage("not read here: AVIF of more than 8 bits with images.window; convert it to 16-bit PNG")
    return None


def _size_fault(size: tuple[int, int], images: ImagesConfig) -> BadImage | None:
    short, long = sorted(size)
    words = f"{size[0]}x{size[1]} pixels are"
    if long * short > images.max_megapixels * 1e6:
        return BadImage(f"too large: {words} over {images.max_megapixels:g} megapixels")
    if long > images.max_aspect * short:
        return BadImage(f"too long: {words} over {images.max_aspect:g} to 1")
    return BadImage(f"too small: {words} under {images.min_side} per side") if short < images.min_side else None


@cache
def _jpeg_decoder(tagged: bool) -> Callable[[Any], Any] | None:
    """Return the fastest JPEG decoder, from a tensor of bytes to a [3, H, W] tensor; None to fall back to Pillow.

    It takes 1.2 ms per photo, Pillow 1.6 ms.

    Args:
        tagged: True if the file may hold an orientation. torchcodec would apply it, but `turned` does so for all files.
    """
    try:
        import_module("torchvision.io")
        # torchvision's Python wrapper warns at each call that torchcodec replaces it. Today both are equally fast.
        native = import_module("torch").ops.image.decode_jpeg
        return lambda data: native(data, 3, False)
    except Exception:  # not installed, or built for another torch (OSError, RuntimeError)
        try:
            return None if tagged else import_module("torchcodec.decoders").decode_jpeg
        except Exception:
            return None


def has_fast_jpeg() -> bool:
    """Check if torch's libraries decode JPEGs. If they are not installed, Pillow does."""
    return _jpeg_decoder(False) is not None


def _fast_jpeg(data: Any, tagged: bool) -> Pixels | None:
    if not (decoder := _jpeg_decoder(tagged)):
        return None
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that the bytes are not writable
            return decoder(torch.from_numpy(np.frombuffer(data, np.uint8))).permute(1, 2, 0).numpy()
    except Exception:  # fall back to Pillow
        return None


@contextmanager
def _silence_libtiff() -> Iterator[None]:
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
            Image.MAX_IMAGE_PIXELS = int(images.max_megapixels * 1e6 / 2)  # Pillow warns above it, refuses above twice
            ImageFile.LOAD_TRUNCATED_IMAGES = lenient
            yield
    finally:
        with _ENTERING:
            found = _inside.pop()
            if not _inside:
                Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = found


def _try(images: ImagesConfig, lenient: bool, work: Callable[[], T]) -> T | BadImage:
    try:
        with _pillow(images, lenient):
            return work()
    except UnfitArray as error:
        return BadImage(str(error))
    except UnidentifiedImageError:
        return BadImage(_UNKNOWN)  # Pillow's message holds a memory address
    except Image.DecompressionBombError:
        return BadImage(f"too large: over {images.max_megapixels:g} megapixels")
    except MemoryError:
        return BadImage("too large: not enough memory")
    except TooSlow:
        return BadImage("too slow: more pieces than an image needs")
    # Pillow's readers raise nearly every kind of exception on a corrupt file, SyntaxError and struct.error too.
    except Exception as error:
        words = re.sub(r" at 0x[0-9a-f]+|[^ -~]+", " ", str(error))[:160].strip() or type(error).__name__
        early = isinstance(error, EOFError) or re.search("truncat|not (large )?enough|expected to read", words, re.I)
        return BadImage(f"{'truncated' if early else 'damaged'}: {words}")


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation that Pillow has not applied itself; 1 if there is none."""
    # Pillow applies the orientation of TIFFs itself.
    if image.format == "TIFF" or not _HOLD_ORIENTATION & image.info.keys():
        return 1
    try:
        turn = Image.Image.getexif(image).get(_ORIENTATION)  # PngImageFile.getexif decodes the picture
    except Exception:  # corrupt EXIF is no reason to refuse a picture
        return 1
    return turn if isinstance(turn, int) and turn in TURNS else 1


def _to_rgb(image: Image.Image, windows: NDArray[np.float64] | None, channels: int) -> Pixels | BadImage:
    """Convert to RGB; keep one channel if `channels` is 1 and the image is grey. [H, W, 3 or 1]"""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        pixels = to_bytes(image_values(image), image_layout(image), channels, windows)
        return BadImage(_NO_NUMBER) if pixels is None else pixels
    if image.has_transparency_data:
        image = _blend_on_white(image.convert("RGBA"))
    if channels == 1 and image.mode == "L":
        return np.array(image)[..., None]
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _gray(pixels: Pixels) -> Pixels:
    """Convert colors to grey with Pillow's weights. [H, W, 3] -> [H, W, 1]"""
    return np.array(Image.fromarray(pixels).convert("L"))[..., None]


def _keep_channels(image: Image.Image, channels: int) -> Pixels | BadImage:
    """Return all bands, alpha included, if there are `channels` of them. [H, W, C]"""
    if image.mode in ("P", "PA") and image.has_transparency_data:  # the channels of a palette are those of its colors
        image = image.convert("RGBA")
    # CMYK is missing on purpose: four inks make three colors.
    if _BANDS.get(image.mode) != channels:
        return BadImage(other_channels(f"{len(image.getbands())} ({image.mode})", channels))
    return np.array(image)


def _blend_on_white(image: Image.Image) -> Image.Image:
    flat = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if np.min(flat.getextrema()) < 255:
        return flat
    # White on white: composite white drawings on black, and drop an alpha channel that was never filled in.
    if image.getchannel("A").getextrema() == (0, 0):
        colors = image.convert("RGB")
        return colors if np.ptp(colors.getextrema(), axis=1).any() else flat
    return Image.alpha_composite(Image.new("RGBA", image.size, "black"), image).convert("RGB")
