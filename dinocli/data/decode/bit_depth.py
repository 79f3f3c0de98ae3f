"""Conversion of raw values of any depth to 8 bits: window or bit depth, colors, white as zero, transparency."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Values = NDArray[Any]
Windows = NDArray[np.float64]
Colors = Literal["", "bands", "gray", "rgb", "cmyk", "ycbcr"]
Alpha = Literal["", "straight", "premultiplied"]

_BITS, _PHOTOMETRIC, _HIGHEST, _SAMPLE_FORMAT = 258, 262, 281, 339  # tags of a TIFF
_BLOCK = 1_000_000  # values converted at once: floats of a large image would take several times its memory


@dataclass(frozen=True)
class Layout:
    """Meaning of the bands of raw values.

    Attributes:
        colors: Meaning of the first bands. With `bands`, all bands are independent.
        range: Values that become black and white without a window, from the depth that the file states. If None, the
            smallest usual range that holds the values.
        alpha: Kind of opacity in the band after the colors; empty if there is none.
        alpha_range: Values of a transparent and an opaque pixel. If None, `range`.
        key: Color of transparent pixels.
        inverted: True if zero is white.
        palette: Color of each value of the first band. [N, 3]
        guessed: True if the full 16 bits replace `range` when a value exceeds it: depth tags are often wrong.
    """

    colors: Colors = "bands"
    range: tuple[float, float] | None = None
    alpha: Alpha = ""
    alpha_range: tuple[float, float] | None = None
    key: tuple[int, ...] | None = None
    inverted: bool = False
    palette: NDArray[np.uint8] | None = None
    guessed: bool = False

    @property
    def count(self) -> int:
        """Number of color bands."""
        return {"gray": 1, "rgb": 3, "cmyk": 4, "ycbcr": 3}.get(self.colors, 0)


def to_bytes(values: Values, layout: Layout, channels: int, windows: Windows | None = None) -> NDArray[np.uint8] | None:
    """Convert raw values to 8 bits, with transparent pixels on white.

    Args:
        values: Integers or floats. [H, W, bands]
        layout: Meaning of the bands.
        channels: Requested number of channels. Grey values are repeated for three.
        windows: Values that become black and white in each channel. Ignored for values of 8 bits or fewer. [C, 2]

    Returns:
        Pixels [H, W, C] with `channels` channels, or 3 for colors. None if no value is a number.
    """
    if values.dtype == bool:
        values = values.view(np.uint8)
    if layout.palette is not None:
        colors = layout.palette[np.minimum(values[..., :1], len(layout.palette) - 1)[..., 0]]
        values = np.concatenate([colors, values[..., 1:]], -1) if layout.alpha else colors
        layout = replace(layout, palette=None, colors="rgb", range=None)
    count = layout.count or values.shape[2]
    if values.dtype == np.uint8:
        if layout.range in (None, (0, 255)) and layout.colors in ("bands", "rgb", "gray") and not layout.alpha:
            return _plain_bytes(values[..., :count], layout, channels)
        layout = replace(layout, range=layout.range or (0, 255))
        if layout.colors in ("bands", "rgb", "gray") and not layout.alpha and layout.key is None:
            # A table of the 256 results is faster: scans in black and white have many pixels.
            every = np.arange(256, dtype=np.uint8)[None, :, None]
            results = _scale(every, replace(layout, colors="gray"), 1, None, 255)[0, :, 0]
            return _repeat(results[values[..., :count]], layout, channels)
    if values.dtype.kind == "u" and layout.range and layout.range[1] <= 255:
        windows = None  # windows apply to deep images only
    stated = layout.range or usual_range(values[..., :count])
    if stated is None:
        return None
    if layout.guessed and windows is None and values.size and values.max() > stated[1]:
        stated = 0, 65535
    if layout.colors == "gray" and windows is not None and (windows == windows[0]).all():
        windows = windows[:1]
    return _draw(values, replace(layout, range=stated), channels, windows)


def _plain_bytes(values: Values, layout: Layout, channels: int) -> NDArray[np.uint8]:
    pixels = 255 - values if layout.inverted else values
    if layout.key is not None:
        pixels = np.where((values == np.array(layout.key)).all(-1, keepdims=True), np.uint8(255), pixels)
    return _repeat(np.ascontiguousarray(pixels), layout, channels)


def _draw(values: Values, layout: Layout, channels: int, windows: Windows | None) -> NDArray[np.uint8]:
    """Composite on white, or on black if all would be white. Ignore an opacity that is zero everywhere."""
    flat = _scale(values, layout, channels, windows, 255)
    if not layout.alpha or flat.min() < 255:
        return flat
    if not _opacity(values, layout).any():
        bare = _scale(values, replace(layout, alpha=""), channels, windows, 255)
        return bare if np.ptp(bare, axis=(0, 1)).any() else flat
    return _scale(values, layout, channels, windows, 0)


def _scale(values: Values, layout: Layout, channels: int, windows: Windows | None, ground: int) -> NDArray[np.uint8]:
    height, width, _ = values.shape
    assert layout.range is not None
    limits = np.array([layout.range]) if windows is None else windows
    wide = {"bands": values.shape[2], "gray": len(limits)}.get(layout.colors, 3)
    pixels = np.empty((height, width, wide), np.uint8)
    for rows in _blocks(values):
        some = values[rows]
        colors = _colors(some, layout)
        low, high = limits.T.astype(colors.dtype)
        scaled: NDArray[Any] = (colors - low) * (255 / (high - low))
        np.clip(scaled, 0, 255, out=scaled)
        if layout.inverted:
            np.subtract(255, scaled, out=scaled)
        if layout.alpha:
            opacity = _opacity(some, layout)
            scaled = scaled * opacity + ground * (1 - opacity)
        if layout.key is not None:
            scaled[(some[..., : layout.count] == np.array(layout.key)).all(-1)] = 255
        pixels[rows] = (np.nan_to_num(scaled, copy=False) + 0.5).astype(np.uint8)
    return _repeat(pixels, layout, channels)


def _colors(values: Values, layout: Layout) -> NDArray[Any]:
    """Return colors in the file's own scale, as floats that hold its integers exactly."""
    assert layout.range is not None
    kind = np.float64 if values.dtype.itemsize > 4 or values.dtype in (np.uint32, np.int32) else np.float32
    low, high = layout.range
    colors: NDArray[Any] = values[..., : layout.count or None].astype(kind)
    if layout.colors == "cmyk":
        light = np.clip((high - colors) / (high - low), 0, 1)
        return light[..., :3] * light[..., 3:] * (high - low) + low
    if layout.colors == "ycbcr":
        half = (high - low + (values.dtype.kind != "f")) / 2
        y, blue, red = colors[..., 0], colors[..., 1] - half, colors[..., 2] - half
        mixed = (y + 1.402 * red, y - 0.344136 * blue - 0.714136 * red, y + 1.772 * blue)
        return np.clip(np.stack(mixed, -1), low, high)
    if layout.alpha == "premultiplied":
        opacity = _opacity(values, layout)
        return np.divide(colors, opacity, out=colors, where=opacity > 0)
    return colors


def _opacity(values: Values, layout: Layout) -> NDArray[np.float32]:
    """Return the opacity of each pixel, from 0 to 1. [H, W, 1]"""
    band = values[..., layout.count : layout.count + 1]
    stated = layout.alpha_range or layout.range
    if band.dtype.kind == "f":
        stated = 0.0, 1.0 if not band.size or np.nanmax(band) <= 1 else (stated or (0, 1))[1]
    assert stated is not None
    low, high = stated
    part = (band.astype(np.float32) - np.float32(low)) / np.float32(high - low)
    return np.clip(np.nan_to_num(part), np.float32(0), np.float32(1))


def _repeat(pixels: NDArray[np.uint8], layout: Layout, channels: int) -> NDArray[np.uint8]:
    grey = layout.colors == "gray" and pixels.shape[2] == 1
    return np.repeat(pixels, channels, -1) if grey and channels > 1 else pixels


def _blocks(values: Values) -> Iterator[slice]:
    height, width, bands = values.shape
    step = max(1, _BLOCK // max(1, width * bands))
    return (slice(start, start + step) for start in range(0, height, step))


def depth_range(bits: int, values_at_most: int | None = None) -> tuple[float, float]:
    """Return the black and white levels of unsigned values.

    Args:
        bits: Number of bits per value.
        values_at_most: Largest value that the file states. Cameras state depths of 10, 12 or 14 bits with it.
    """
    top = 2**bits - 1
    if values_at_most is not None:
        top = min(top, 2 ** max(8, values_at_most.bit_length()) - 1)
    return 0, top


def image_layout(image: Image.Image) -> Layout:
    """Return the layout of a deep grey Pillow image: mode I, I;16 and its variants, or F."""
    stated = None
    if image.mode.startswith("I;16"):
        highest = _tag(image, _HIGHEST)
        stated = depth_range(_tag(image, _BITS) or 16, highest if isinstance(highest, int) else None)
    # Pillow itself inverts only 8 bits.
    inverted = image.mode != "I" and _tag(image, _PHOTOMETRIC) == 0
    return Layout("gray", stated, inverted=inverted, guessed=stated is not None)


def image_values(image: Image.Image) -> Values:
    """Return the values of a deep grey Pillow image. [H, W, 1]"""
    values = np.asarray(image)
    if image.mode == "I" and (_tag(image, _BITS), _tag(image, _SAMPLE_FORMAT) or 1) == (32, 1):
        values = values.view(np.uint32)  # Pillow reads them as signed
    return values[..., None]


def _tag(image: Image.Image, number: int) -> Any:
    """Return the first value of a TIFF tag; None for other files."""
    value = getattr(image, "tag_v2", {}).get(number)
    return value[0] if isinstance(value, tuple) and value else value


def usual_range(values: Values) -> tuple[float, float] | None:
    """Return the smallest usual range that holds all values, for files that state none; None without numbers."""
    ends, samples = [], []
    for rows in _blocks(values):
        part = _numbers(values[rows])
        if part.size:
            ends.append((float(part.min()), float(part.max())))
            samples.append(part[:: 1 + values.size // 1_000_000])
    if not ends:
        return None
    least, most = min(low for low, _ in ends), max(high for _, high in ends)
    tops = (1, 255, 65535, 2**32 - 1) if least >= 0 else (1, 128, 32768, 2**31)
    top = next((float(t) for t in tops if max(most, -least) <= t), max(most, -least))
    bottom = 0.0 if least >= 0 else -top
    # A few outliers, or 1.01 in values up to 1, would leave almost no contrast. Then use the values' own range.
    sample = np.concatenate(samples)
    low, high = (float(np.percentile(sample, q)) for q in (1, 99))
    if high - low >= (top - bottom) / 32 or least == most:
        return bottom, top
    return (low, high) if low < high else (least, most)


def _numbers(values: Values) -> Values:
    """Return the values that count as numbers. Huge floats stand for missing values."""
    if values.dtype.kind != "f":
        return values.ravel()
    values = values.astype(np.float32) if values.dtype.itemsize < 4 else values
    return values[np.isfinite(values) & (np.abs(values) < 1e30)]
