"""Maps of whole photos, with values per patch; large photos are cut into overlapping tiles."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dinocli.core.errors import DinoError
from dinocli.data.decode.pixels import Pixels
from dinocli.features.encoder import MOST_PATCHES, Encoder
from dinocli.models.backbone import Backbone

_FEWEST = 4  # patches along a side of a tile: they overlap by a quarter


@dataclass(frozen=True)
class PhotoMap:
    """Map of a photo.

    Attributes:
        values: Values per patch, such as features or the attention of each head. [K, rows, columns]
        margins: Share of the photo's height, and of its width, beyond the map at each end. Not 0 if patches overlap:
            the map then ends half a stride after the center of the last patch.
        tile_share: Share of the map in a tile; 1 without tiles.
        reduced_to: Short side of the network's input in pixels, if the limit on patches reduced the photo. None if not.
    """

    values: Tensor
    margins: tuple[float, float]
    tile_share: float
    reduced_to: int | None


def photo_map(
    encoder: Encoder, pixels: Pixels, short_side: int, compute: Callable[[Tensor], Tensor], tile: int | None = None
) -> PhotoMap:
    """Compute a map of a photo of any size and shape, in overlapping tiles if the photo is larger than a tile.

    Args:
        encoder: Encoder that `compute` uses.
        pixels: Pixels of the photo. [H, W, C]
        short_side: Short side in pixels after resizing; both sides are then rounded to whole patches. Without tiles,
            photos of more patches than `encoder.photo` allows are resized to a smaller size.
        compute: Function from a normalized image [1, C, H', W'] to its map [K, rows, columns].
        tile: Side of the tiles in pixels, a multiple of the patch size. If None, the photo is processed as a whole.

    Raises:
        DinoError: If the tile does not fit the patches, or has more patches than the memory limit.
    """
    backbone = encoder.backbone
    if tile:
        check_tile(backbone, tile)
    image = encoder.photo(pixels, short_side, sys.maxsize if tile else MOST_PATCHES)
    height, width = image.shape[-2:]
    rows, columns = backbone.map_size(height, width)
    patch, overlap = backbone.patch_size, backbone.patch_size - backbone.stride
    margins = (overlap / 2 / (height // patch * patch), overlap / 2 / (width // patch * patch))
    down, across = (min(tile or side, side) for side in (height, width))
    if (down, across) == (height, width):
        # Rounding to whole patches may also take up to half a patch.
        reduced = min(height, width) < short_side - patch
        return PhotoMap(compute(image), margins, 1.0, min(height, width) if reduced else None)
    corners = [(top, left) for top in tile_starts(height, down, patch) for left in tile_starts(width, across, patch)]
    parts = ((top, left, compute(image[..., top : top + down, left : left + across])) for top, left in corners)
    values = stitch(
        ((top // backbone.stride, left // backbone.stride, part) for top, left, part in parts), rows, columns
    )
    cells = backbone.map_size(down, across)
    return PhotoMap(values, margins, cells[0] * cells[1] / (rows * columns), None)


def check_tile(backbone: Backbone, tile: int) -> None:
    """Check the side of the tiles.

    Raises:
        DinoError: If it is no multiple of the patch size, too small, or has more patches than the memory limit.
    """
    patch, least = backbone.patch_size, _FEWEST * backbone.patch_size
    if tile % patch or tile < least:
        near = max(least, round(tile / patch) * patch)
        raise DinoError(
            f"--tile {tile} does not fit patches of {patch} pixels; expected a multiple of {patch}, at least {least}",
            f"--tile {near}",
        )
    rows, columns = backbone.map_size(tile, tile)
    if rows * columns > MOST_PATCHES:
        most = int(MOST_PATCHES**0.5) * backbone.stride // patch * patch
        raise DinoError(
            f"--tile {tile} has {rows * columns:,} patches; expected at most {MOST_PATCHES:,}", f"--tile {most} or less"
        )


def activation_bytes(backbone: Backbone, tile: int | None) -> tuple[int, int]:
    """Return the largest number of patches that are processed at once, and about how many bytes a transformer takes.

    At the peak, a block holds its input, the norm of that, and the hidden units of its MLP before and after the
    activation: ten widths per patch, in float32.

    Args:
        backbone: Backbone of the maps.
        tile: Side of the tiles in pixels. If None, the limit of `encoder.photo` counts.
    """
    rows, columns = backbone.map_size(tile, tile) if tile else (MOST_PATCHES, 1)
    return rows * columns, 4 * 10 * rows * columns * backbone.width


def tile_starts(side: int, tile: int, patch: int) -> list[int]:
    """Return the first pixel of each tile along a side: evenly spaced whole patches, with a quarter of overlap or more.

    Args:
        side: Length of the side in pixels, whole patches.
        tile: Length of a tile in pixels, whole patches and at most `side`.
        patch: Side of a patch in pixels.
    """
    rest, length = (side - tile) // patch, tile // patch
    gaps = -(-rest // (length - max(1, length // 4))) if rest else 0
    return [i * rest // gaps * patch for i in range(gaps + 1)] if gaps else [0]


def stitch(parts: Iterator[tuple[int, int, Tensor]], rows: int, columns: int) -> Tensor:
    """Join the maps of overlapping tiles to one map [K, rows, columns], without seams.

    Each value is the mean over its tiles. The weight of a tile is a squared sine along each axis, which falls to 0 at
    its border. Only one tile and the result are in memory.

    Args:
        parts: First row and column of each tile, and its map. [K, r, c]
        rows: Rows of the result.
        columns: Columns of the result.
    """
    total, weights = torch.zeros(()), torch.zeros(())
    for top, left, part in parts:
        if not total.ndim:
            total, weights = part.new_zeros(len(part), rows, columns), part.new_zeros(rows, columns)
        window = _fade(part.shape[-2], part)[:, None] * _fade(part.shape[-1], part)
        where = slice(top, top + part.shape[-2]), slice(left, left + part.shape[-1])
        total[:, *where] += part * window
        weights[where] += window
    return total / weights


def _fade(count: int, like: Tensor) -> Tensor:
    centers = torch.arange(0.5, count, dtype=like.dtype, device=like.device)
    return (centers * (torch.pi / count)).sin().square()
