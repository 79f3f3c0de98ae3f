"""Colors and orientation of a decoded picture: conversion to the requested channels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinocli.data.decode.bit_depth import image_layout, image_values, to_bytes
from dinocli.data.decode.pixels import NO_NUMBER, BadImage, Pixels
from dinocli.data.decode.raster import other_channels
from dinocli.data.decode.turns import TURNS

_ORIENTATION = 0x0112
HOLD_ORIENTATION = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}
# Channels of modes that are read unconverted. RGBX has four bands, and Pillow knows the meaning of three.
_BANDS = {"LA": 2, "RGBA": 4, "RGBX": 4}


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation that Pillow has not applied itself; 1 if there is none."""
    # Pillow applies the orientation of TIFFs itself.
    if image.format == "TIFF" or not HOLD_ORIENTATION & image.info.keys():
        return 1
    try:
        turn = Image.Image.getexif(image).get(_ORIENTATION)  # PngImageFile.getexif decodes the picture
    except Exception:  # corrupt EXIF is no reason to refuse a picture
        return 1
    return turn if isinstance(turn, int) and turn in TURNS else 1


def to_rgb(image: Image.Image, windows: NDArray[np.float64] | None, channels: int) -> Pixels | BadImage:
    """Convert to RGB; keep one channel if `channels` is 1 and the image is grey. [H, W, 3 or 1]"""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        pixels = to_bytes(image_values(image), image_layout(image), channels, windows)
        return BadImage(NO_NUMBER) if pixels is None else pixels
    if image.has_transparency_data:
        image = _blend_on_white(image.convert("RGBA"))
    if channels == 1 and image.mode == "L":
        return np.array(image)[..., None]
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def to_gray(pixels: Pixels) -> Pixels:
    """Convert colors to grey with Pillow's weights. [H, W, 3] -> [H, W, 1]"""
    return np.array(Image.fromarray(pixels).convert("L"))[..., None]


def keep_channels(image: Image.Image, channels: int) -> Pixels | BadImage:
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
