"""Images of 16 and 32 bits and of floats to 8 bits, and of depths between for which Pillow takes a loop in Python."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.ImageFile import ImageFile

_BITS, _PHOTOMETRIC, _HIGHEST, _SAMPLE_FORMAT = 258, 262, 281, 339  # tags of a TIFF


def deep_to_gray(image: Image.Image, window: tuple[float, float] | None) -> NDArray[np.uint8] | None:
    """8 bits of an image with more; none where no value is a number. [H, W]

    Pillow's own convert("RGB") clips such files at 255, which makes most of them white, or black if they are floats.

    Args:
        image: Of mode I, I;16 and its kin, or F.
        window: Values that become black and white; absent, by the depth that the file states, or the values' range.
    """
    values = np.asarray(image)
    if image.mode == "I" and (_tag(image, _BITS), _tag(image, _SAMPLE_FORMAT)) == (32, 1):
        values = values.view(np.uint32)  # Pillow knows only signed ones
    real = values[np.isfinite(values) & (np.abs(values) < 1e30)] if image.mode == "F" else values
    if not real.size:
        return None
    if image.format == "PPM" and image.mode == "I":  # the file told its depth, and Pillow scaled it
        usual: tuple[float, float] = 0, 65535
    else:
        usual = _depth(image, real) if image.mode.startswith("I;16") else _usual(real)
    low, high = window or usual
    grey = values.astype(np.float32)  # in place from here, as these images may be large
    grey -= low
    grey *= 255 / (high - low)
    np.clip(grey, 0, 255, out=grey)
    if image.mode != "I" and _tag(image, _PHOTOMETRIC) == 0:  # white is zero, which Pillow minds in 8 bits only
        np.subtract(255, grey, out=grey)
    return (np.nan_to_num(grey, copy=False) + 0.5).astype(np.uint8)


def windowed(values: NDArray[Any], windows: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Values to 8 bits.

    Args:
        values: [H, W, C]
        windows: What becomes black and what white, of each channel or of all. [C or 1, 2]
    """
    low, high = windows.T
    scaled = (values.astype(np.float32) - low.astype(np.float32)) * (255 / (high - low)).astype(np.float32)
    np.clip(scaled, 0, 255, out=scaled)
    return (np.nan_to_num(scaled, copy=False) + 0.5).astype(np.uint8)


def array_to_bytes(values: NDArray[Any], windows: NDArray[np.float64] | None) -> NDArray[np.uint8] | None:
    """8 bits of an array; those of 8 bits as they are, and none where no value is a number. [H, W, C]

    Args:
        values: Integers or floats. [H, W, C]
        windows: As of `windowed`; absent, all that 16 bits can hold, or the usual range that holds the values.
    """
    if values.dtype == np.uint8:
        return np.ascontiguousarray(values)
    if values.dtype.kind == "f":
        values = values.astype(np.float32)
    real = values[np.isfinite(values) & (np.abs(values) < 1e30)] if values.dtype.kind == "f" else values
    if not real.size:
        return None
    if windows is None:
        windows = np.array([(0, 65535) if values.dtype.kind == "u" and values.itemsize == 2 else _usual(real)])
    return np.ascontiguousarray(windowed(values, windows))


def is_deep_color(image: ImageFile) -> bool:
    """Whether this is a color image of 16 bits, before it is loaded: then Pillow keeps the upper 8 only."""
    return image.mode in ("RGB", "RGBA") and any(";16" in str(tile.args) for tile in image.tile)


def read_ppm(image: ImageFile, data: bytes, windows: NDArray[np.float64] | None) -> Image.Image | None:
    """A binary PPM with another largest value than 255 or 65535, a hundred times as fast as by Pillow's own loop.

    Returns:
        The image; None where it is none of these, or not all there.
    """
    if not image.tile or image.tile[0].codec_name != "ppm" or image.mode not in ("L", "RGB", "I"):
        return None
    (_, maximum), offset = cast(tuple[str, int], image.tile[0].args), image.tile[0].offset
    bands = len(image.getbands())
    kind, count = np.dtype(">u2" if maximum > 255 else "u1"), image.width * image.height * bands
    if len(data) - offset < count * kind.itemsize:
        return None
    values = np.frombuffer(data, kind, count, offset).reshape(image.height, image.width, bands)
    values = values[..., 0] if bands == 1 else values
    if windows is not None and image.mode == "RGB" and maximum > 255:
        made = Image.fromarray(windowed(values, windows))
    else:
        top = 65535 if image.mode == "I" else 255
        scaled = np.minimum(np.round(values / maximum * top), top)
        made = Image.fromarray(scaled.astype(np.int32 if image.mode == "I" else np.uint8))
    made.format = image.format
    return made


def _tag(image: Image.Image, number: int) -> Any:
    """The (first) value of a TIFF's tag, None for other files."""
    value = getattr(image, "tag_v2", {}).get(number)
    return value[0] if isinstance(value, tuple) and value else value


def _depth(image: Image.Image, values: NDArray[Any]) -> tuple[float, float]:
    top = 2 ** (_tag(image, _BITS) or 16) - 1
    if isinstance(highest := _tag(image, _HIGHEST), int):  # how cameras of 10, 12 or 14 bits state their depth
        top = min(top, 2 ** max(8, highest.bit_length()) - 1)
    return 0, top if values.max() <= top else 65535


def _usual(values: NDArray[Any]) -> tuple[float, float]:
    """The smallest usual range that holds all values, as the file does not tell it."""
    least, most = float(values.min()), float(values.max())
    tops = (1, 255, 65535, 2**32 - 1) if least >= 0 else (1, 128, 32768, 2**31)
    top = next((float(t) for t in tops if max(most, -least) <= t), max(most, -least))
    bottom = 0.0 if least >= 0 else -top
    # A few outliers, or 1.01 where 1 was the end, and next to nothing would be left to see: then the values' own range.
    sample = values.ravel()[:: 1 + values.size // 1_000_000]
    low, high = (float(np.percentile(sample, q)) for q in (1, 99))
    if high - low >= (top - bottom) / 32 or least == most:
        return bottom, top
    return (low, high) if low < high else (least, most)
