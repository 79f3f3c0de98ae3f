"""Pictures: maps in color, and sheets of panels with captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from dinocli.data.decode import Pixels

_PAPER, _INK = (255, 255, 255), (40, 40, 40)


@dataclass(frozen=True)
class Panel:
    """A picture with a line of text below it.

    Attributes:
        pixels: [H, W, 3]
        caption: The line.
    """

    pixels: Pixels
    caption: str


def heat(values: NDArray[np.floating], height: int, width: int, scale: tuple[float, float] | None = None) -> Pixels:
    """A map [rows, columns] in color at a photo's size. [H, W, 3]

    Args:
        values: The map.
        height: Of the photo.
        width: Of the photo.
        scale: What is black and what is yellow; absent, the lowest and the highest value.
    """
    low, high = scale or (float(values.min()), float(values.max()))
    small = Image.fromarray(((values - low) / ((high - low) or 1.0)).astype(np.float32))
    large = np.clip(np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)), 0, 1)
    return (colormaps["inferno"](large)[..., :3] * 255 + 0.5).astype(np.uint8)


def visible(pixels: Pixels) -> Pixels:
    """What can be shown of any channels: the first three as colors, or the first as grey. [H, W, C] -> [H, W, 3]"""
    few = pixels[..., :3] if pixels.shape[2] >= 3 else np.repeat(pixels[..., :1], 3, -1)
    return np.ascontiguousarray(few)


def spotlight(pixels: Pixels, mask: NDArray[np.bool_]) -> Pixels:
    """A photo with all outside a mask gray and pale. [H, W, 3], [H, W] -> [H, W, 3]"""
    gray = pixels @ np.array([0.299, 0.587, 0.114])
    pale = (170 + gray * 0.3).astype(np.uint8)[..., None]
    return np.where(mask[..., None], pixels, pale)


def sheet(rows: Sequence[Sequence[Panel | None]]) -> Image.Image:
    """Panels of one size in rows; where there is none the paper shows."""
    height, width = next(panel for row in rows for panel in row if panel).pixels.shape[:2]
    gap = max(4, min(height, width) // 40)
    line = max(12, round(min(height, width) / 14))
    font = ImageFont.load_default(size=line * 0.8)
    columns = max(len(row) for row in rows)
    page = Image.new("RGB", (gap + columns * (width + gap), gap + len(rows) * (height + line + gap)), _PAPER)
    pen = ImageDraw.Draw(page)
    for r, row in enumerate(rows):
        for c, panel in enumerate(row):
            if panel:
                left, top = gap + c * (width + gap), gap + r * (height + line + gap)
                page.paste(Image.fromarray(panel.pixels), (left, top))
                pen.text((left + width / 2, top + height + line * 0.55), panel.caption, _INK, font, anchor="mm")
    return page
