"""Tiles of pyramidal TIFFs and whole-slide images."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from functools import lru_cache
from importlib import import_module
from typing import Any

import numpy as np

from dinocli.data.decode.raster import ArrayFile, UnfitArray, picture_layout

_OPEN = 8  # slides that each process keeps open


@lru_cache(_OPEN)
def _open(path: str, changed: int, process: int) -> Any:
    """Open a slide, once per process: a worker must not share the file position of its parent."""
    return import_module("tiffslide").TiffSlide(path)


def _level(path: str, level: int) -> tuple[Any, int, int]:
    slide = _open(path, os.stat(path).st_mtime_ns, os.getpid())
    if level >= slide.level_count:
        raise UnfitArray(f"no such level: {level}; the slide has levels 0 to {slide.level_count - 1} (images.level)")
    width, height = slide.level_dimensions[level]
    return slide, int(width), int(height)


def count_levels(path: str) -> int:
    """Return the number of levels of the pyramid; 1 for a plain TIFF, and for one that tiffslide does not read."""
    try:
        return int(_open(path, os.stat(path).st_mtime_ns, os.getpid()).level_count)
    except Exception:  # tiffslide raises nearly any exception for layouts that it does not know
        return 1


def tile_corners(path: str, tile: int, level: int) -> Iterator[tuple[int, int]]:
    """Yield the upper left corners of the tiles that lie within a level, as x and y in its own pixels.

    Raises:
        UnfitArray: If the slide has no such level, or the level is smaller than a tile.
    """
    _, width, height = _level(path, level)
    if width < tile or height < tile:
        raise UnfitArray(f"too small: level {level} of {width}x{height} pixels; expected at least {tile} (images.tile)")
    yield from ((x, y) for y in range(0, height - tile + 1, tile) for x in range(0, width - tile + 1, tile))


def open_tile(path: str, corner: tuple[int, int], tile: int, level: int, channels: int) -> ArrayFile:
    """Read a tile of a level.

    Args:
        path: Pyramidal TIFF, or a slide that tiffslide reads.
        corner: x and y of its upper left corner, in pixels of the level.
        tile: Side in pixels.
        level: Level of the pyramid; 0 is the largest.
        channels: Requested number of channels.

    Raises:
        UnfitArray: If the tile reaches beyond the level, where tiffslide would return black.
    """
    slide, width, height = _level(path, level)
    if max(corner[0] + tile - width, corner[1] + tile - height) > 0:
        raise UnfitArray(f"no such tile: {corner[0]},{corner[1]}; level {level} has {width}x{height} pixels")
    # tiffslide takes pixels of level 0 and divides them by one factor for both axes, rounding down.
    factor = slide.level_downsamples[level]
    place = [next(p for p in range(math.ceil(at * factor) - 1, 2**62) if int(p / factor) == at) for at in corner]
    values = np.asarray(slide.read_region(place, level, (tile, tile), as_array=True))
    values = values[..., None] if values.ndim == 2 else values
    if values.dtype.kind != "u" or values.shape[:2] != (tile, tile):
        raise UnfitArray(f"not read here: a slide of {values.dtype} with axes of {values.shape}")
    layout = picture_layout("slide", values.shape[2], (0.0, float(np.iinfo(values.dtype).max)), channels)
    return ArrayFile("TIFF", tile, tile, values.shape[2], values.dtype, layout, lambda: values)
