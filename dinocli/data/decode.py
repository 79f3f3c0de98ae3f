"""Bytes to pixels: uint8 RGB, upright, whatever the file's mode; a bad file is a value and not a crash."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

# More than any camera's photo; what is larger is a mistake or an attack. Pillow itself refuses at 179 million.
MAX_PIXELS = 150_000_000

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class BadImage:
    """A file that could not be read as an image, and why, in a few words."""

    reason: str


def decode(data: bytes) -> Pixels | BadImage:
    """Decode an image file.

    EXIF orientation is applied, transparency is laid on white, 16-bit grey is scaled by its depth, 32-bit and float
    by the range that holds it; of an animation the first frame is taken.

    Returns:
        [H, W, 3], or the reason why not.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                if image.width * image.height > MAX_PIXELS:
                    return BadImage(f"{image.width}x{image.height} is over {MAX_PIXELS // 1_000_000} megapixels")
                return np.array(_to_rgb(ImageOps.exif_transpose(image)))
    except UnidentifiedImageError:
        return BadImage("not an image that Pillow knows")  # its own words hold a memory address
    # Pillow's readers raise nearly every kind of exception on a broken file: SyntaxError and struct.error too.
    except Exception as error:
        return BadImage(f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")[:200])


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):
        return Image.fromarray(_to_eight_bits(np.asarray(image, dtype=np.float64), 65535)).convert("RGB")
    if image.mode in ("I", "F"):
        # The file does not tell the range of these: the smallest usual one that holds its values.
        values = np.asarray(image, dtype=np.float64)
        top = next((t for t in (1.0, 255.0, 65535.0) if values.max(initial=0.0) <= t), float(2**32 - 1))
        return Image.fromarray(_to_eight_bits(values, top)).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _to_eight_bits(values: NDArray[np.float64], top: float) -> Pixels:
    # Pillow's own convert("RGB") clips such files at 255, which makes most of them white, or black if they are floats.
    return (np.clip(values / top, 0, 1) * 255 + 0.5).astype(np.uint8)
