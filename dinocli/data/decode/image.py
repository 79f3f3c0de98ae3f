"""Image decoding to upright uint8 pixels, RGB or grey for every file mode. Bad files return a `BadImage`."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import Any

import numpy as np
from PIL import Image, ImageFile

from dinocli.data.decode.arrays import open_array
from dinocli.data.decode.bit_depth import to_bytes
from dinocli.data.decode.colors import HOLD_ORIENTATION, keep_channels, orientation, to_gray, to_rgb
from dinocli.data.decode.guards import BODY, Reader, check_tags, gif_frames, size_fault, slow_fault
from dinocli.data.decode.jpeg_header import decodes_alike, find_frame, plain_header
from dinocli.data.decode.pillow import decode_or_reason, read_header, silence_libtiff
from dinocli.data.decode.pixels import NO_NUMBER, UNKNOWN_FORMAT, BadImage, Data, Pixels
from dinocli.data.decode.raster import ArrayFile
from dinocli.data.decode.tiff import open_tiff
from dinocli.data.decode.tiff_tags import SIGNATURES, Facts
from dinocli.data.decode.torch_codecs import decode_jpeg_fast
from dinocli.data.decode.turns import turned
from dinocli.data.decode.unread import name_jpeg, name_unread
from dinocli.data.images import DEFAULTS, ImagesConfig, megabytes_over

logging.getLogger("PIL").addHandler(logging.NullHandler())  # otherwise it prints messages about bad files to stderr


_COUNTED = ("PNG", "WEBP", "AVIF", "DCX", "FLI", "IM", "SPIDER")  # their headers state the number of pictures
_NOTHING_LEFT = "truncated: no pixels left"
_GREY: dict[str, Any] = {"L": 128, "RGB": (128,) * 3, "RGBA": (128, 128, 128, 255), "I;16": 32768}


class Opened:
    """Image file after reading only its header.

    Attributes:
        height: Height in pixels, upright.
        width: Width in pixels, upright.
        format: Pillow's name of the format, or `NPY`. None for an image that came decoded.
        mode: Pillow's mode of the pixels, or of one channel of an array. `I;16` is deep, `L` grey.
        pages: Number of pages or frames in the file. Only the first is read.
        turn: EXIF orientation of the stored pixels, 1 to 8.
    """

    def __init__(
        self,
        source: Data,
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
        self._image, self.turn, self._tagged, self._plain_jpeg = image, turn, tagged, plain_jpeg
        self._array, self._palette = array, palette
        self.width, self.height = size[::-1] if turn > 4 else size
        self.format, self.mode, self.pages = format, mode, pages

    @property
    def deep(self) -> bool:
        """True if values have more than 8 bits."""
        return self.mode.startswith(("I", "F"))

    @property
    def for_device(self) -> bool:
        """True if a device may decode the stored pixels, to RGB: a JPEG that is not decoded smaller.

        They are the same as on the host, except that `turn` is not applied.
        """
        small = self.width * self.height <= self._images.reduce_above * 1e6 and self._images.channels == 3
        source = self._source
        return small and self.format == "JPEG" and self._plain_jpeg and type(source) is bytes and decodes_alike(source)

    def pixels(self, reduce: int = 1) -> Pixels | BadImage:
        """Decode the image.

        Args:
            reduce: Factor 1, 2, 4 or 8 by which a JPEG is decoded smaller, rounded up, to save time. Other formats keep
                their size, so check the shape of the result. Headers of icons and PNGs may also state a wrong size.

        Returns:
            Pixels [H, W, C], or the reason for failure.
        """
        if isinstance(self._source, np.ndarray):
            return self._source
        if self._array:
            found = decode_or_reason(self._images, False, self._array_pixels)
            if isinstance(found, BadImage) and self._images.truncated and self.format == "PNG":
                return decode_or_reason(self._images, True, self._array_pixels)
            return found
        if self._plain_jpeg and reduce == 1 and self._images.channels in (1, 3):
            fast = decode_jpeg_fast(self._source, self._tagged)
            if fast is not None and fast.shape[1::-1] == self._size:
                return turned(to_gray(fast) if self._images.channels == 1 else fast, self.turn)
        image, self._image = self._image, None  # Pillow can load a file only once
        result = decode_or_reason(self._images, False, lambda: self._load(image, reduce))
        if isinstance(result, BadImage) and self._images.truncated and isinstance(self._source, bytes):
            return decode_or_reason(self._images, True, lambda: self._load(None, reduce))
        return result

    def _array_pixels(self) -> Pixels | BadImage:
        assert self._array
        channels = self._images.channels
        with silence_libtiff() if self.format in ("TIFF", "JPEG2000", "RAW") else nullcontext():
            values = self._array.read()
        pixels = to_bytes(values, self._array.layout, channels, self._images.windows)
        if pixels is None:
            return BadImage(NO_NUMBER)
        pixels = to_gray(pixels) if channels == 1 and pixels.shape[2] == 3 else pixels
        if ImageFile.LOAD_TRUNCATED_IMAGES and (pixels == pixels[:1, :1]).all():
            return BadImage(_NOTHING_LEFT)
        return turned(pixels, self.turn)

    def _load(self, image: Image.Image | None, reduce: int) -> Pixels | BadImage:
        assert isinstance(self._source, bytes | Image.Image)
        lenient = ImageFile.LOAD_TRUNCATED_IMAGES
        if isinstance(self._source, Image.Image):
            image = self._source
        else:
            image = image or read_header(self._source)
            if reduce > 1:
                image.draft(None, (max(1, image.width // reduce), max(1, image.height // reduce)))
            if isinstance(reader := getattr(image, "fp", None), Reader):
                reader.left = BODY
        if lenient and image.mode in _GREY and image.format in ("PNG", "BMP", "TIFF", "PPM", "TGA"):
            image.im = Image.new(image.mode, image.size, _GREY[image.mode]).im  # Pillow would start from black
        windows, channels = self._images.windows, self._images.channels
        with silence_libtiff() if image.format == "TIFF" else nullcontext():
            image.load()
        # The size of an icon is known only after loading.
        if image.size != self._size and reduce == 1 and (fault := size_fault(image.size, self._images)):
            return fault
        if self._palette is not None and image.mode == "P":
            image = Image.fromarray(self._palette[np.minimum(np.asarray(image), len(self._palette) - 1)])
        pixels = to_rgb(image, windows, channels) if channels in (1, 3) else keep_channels(image, channels)
        if channels == 1 and not isinstance(pixels, BadImage) and pixels.shape[2] == 3:
            pixels = to_gray(pixels)
        if lenient and not isinstance(pixels, BadImage) and (pixels == pixels[:1, :1]).all():
            return BadImage(_NOTHING_LEFT)
        return pixels if isinstance(pixels, BadImage) else turned(pixels, orientation(image))


def reduction(room: float) -> int:
    """Return the largest reduction (8, 4, 2 or 1) for decoding an image that may be made `room` times smaller."""
    return next((r for r in (8, 4, 2) if room >= r), 1)


def open_image(data: Data, images: ImagesConfig = DEFAULTS) -> Opened | BadImage:
    """Read the header of an image file and check it against the limits, before memory for its pixels is allocated.

    Decoding applies the EXIF orientation. Transparency is composited on white if `images.channels` is 1 or 3. Deep
    values are scaled by `images.window`. By default, 16-bit values are scaled by their bit depth, 32-bit and float
    values by the smallest usual range that holds them. Only the first frame of an animation is read.

    Returns:
        The opened image, or the reason for failure. Corrupt files do not raise.
    """
    if isinstance(data, np.ndarray):
        return _describe_pixels(data, images)
    if isinstance(data, ArrayFile):
        return _describe_array(data, data, images)
    # Fast path for most photos. All other files go through Pillow.
    if isinstance(data, bytes) and len(data) <= images.max_megabytes * 1e6:
        plain = plain_header(data)
        if plain and not size_fault(plain.size, images):
            return Opened(data, images, plain.size, mode=plain.mode)
    opened = decode_or_reason(images, False, lambda: _open(data, images))
    if isinstance(opened, BadImage) and opened.reason == UNKNOWN_FORMAT and isinstance(data, bytes):
        return BadImage(name_unread(data))
    return opened


def decode(data: Data, images: ImagesConfig = DEFAULTS) -> Pixels | BadImage:
    """Decode an image file as described in `open_image`. Return [H, W, C], or the reason for failure."""
    opened = open_image(data, images)
    return opened if isinstance(opened, BadImage) else opened.pixels()


def _open(data: bytes | Image.Image, images: ImagesConfig) -> Opened | BadImage:
    if isinstance(data, Image.Image):
        return size_fault(data.size, images) or _describe(data, data, images)
    if not data:
        return BadImage("empty: the file has no bytes")
    if len(data) > images.max_megabytes * 1e6:
        return BadImage(f"too large: {megabytes_over(len(data), images.max_megabytes)}")
    facts = None
    if data[:4] in SIGNATURES:
        check_tags(data)
        found = open_tiff(data, images.channels)
        if isinstance(found, ArrayFile):
            return _describe_array(data, found, images)
        facts = found
    elif array := open_array(data, images):
        return _describe_array(data, array, images)
    image = read_header(data)
    fault = size_fault(image.size, images) or slow_fault(image, data) or _kind_fault(image, data, images)
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
        tagged=bool(HOLD_ORIENTATION & image.info.keys()),
        plain_jpeg=plain and image.format in ("JPEG", "MPO") and isinstance(source, bytes),
        palette=facts.colors if facts else None,
        pages=facts.pages if facts else _count_pages(image, source) if isinstance(source, bytes) else 1,
    )


def _describe_pixels(pixels: Pixels, images: ImagesConfig) -> Opened | BadImage:
    height, width, channels = pixels.shape
    mode = "RGB" if channels == 3 else "L"
    return size_fault((width, height), images) or Opened(pixels, images, (width, height), format=None, mode=mode)


def _count_pages(image: Image.Image, data: bytes) -> int:
    """Count frames if that is cheap. An MPO counts as one: its second picture is a preview or a depth map."""
    if image.format == "GIF":
        return gif_frames(data)
    return getattr(image, "n_frames", 1) if image.format in _COUNTED else 1


def _describe_array(data: bytes | ArrayFile, array: ArrayFile, images: ImagesConfig) -> Opened | BadImage:
    size, count = (array.width, array.height), max(images.channels, array.bands)
    if array.width * array.height * count > 3 * images.max_megapixels * 1e6:  # limits memory
        what = f"{size[0]}x{size[1]} pixels of {count} channels"
        return BadImage(f"too large: {what} are over {images.max_megapixels:g} megapixels of three channels")
    taken = array.width * array.height * array.bands * array.dtype.itemsize
    if taken > max(6 * images.max_megapixels * 1e6, len(data) if isinstance(data, bytes) else 0):
        what = f"{size[0]}x{size[1]} pixels of {array.bands * array.dtype.itemsize} bytes each"
        return BadImage(f"too large: {what} are over {images.max_megapixels:g} megapixels of six bytes")
    mode = "F" if array.dtype.kind == "f" else "L" if array.dtype.itemsize == 1 else "I"
    turn, pages = array.turn, array.pages
    if array.format == "PNG" and isinstance(data, bytes) and not size_fault(size, images):
        image = read_header(data)
        turn, pages = orientation(image), _count_pages(image, data)
    return size_fault(size, images) or Opened(
        data, images, size, format=array.format, mode=mode, array=array, turn=turn, plain_jpeg=False, pages=pages
    )


def _kind_fault(image: ImageFile.ImageFile, data: bytes, images: ImagesConfig) -> BadImage | None:
    """Refuse variants that Pillow mistakes for others, or reads with fewer bits than `images.window` refers to."""
    if image.format in ("JPEG", "MPO") and (frame := find_frame(data)) and not frame.is_common:
        return BadImage(name_jpeg(frame.kind, frame.bits))
    at = data.find(b"av1C", 0, 4096) if image.format == "AVIF" and images.window else -1
    if 0 < at < len(data) - 6 and data[at + 6] & 0x40:
        return BadImage("not read here: AVIF of more than 8 bits with images.window; convert it to 16-bit PNG")
    return None
