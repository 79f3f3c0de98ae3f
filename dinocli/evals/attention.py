"""Attention of the class token in the last block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dinocli.data.decode.pixels import Pixels
from dinocli.evals.photo_maps import photo_map
from dinocli.features.encoder import Encoder


@dataclass(frozen=True)
class AttentionMaps:
    """Attention maps of one image.

    Attributes:
        heads: Share of the class token's attention per head and patch, without its attention to itself.
            [heads, rows, columns]
        margins: Share of the photo's height, and of its width, beyond the maps at each end; see `PhotoMap`.
        reduced_to: Short side of the network's input in pixels, if the photo had too many patches; see `PhotoMap`.
    """

    heads: NDArray[np.float32]
    margins: tuple[float, float] = (0.0, 0.0)
    reduced_to: int | None = None

    def masks(self, keep: float) -> NDArray[np.bool_]:
        """Return the smallest mask per head that holds a share `keep` of its attention. [heads, rows, columns]"""
        return keep_mass(self.heads, keep)


@dataclass(frozen=True)
class Overlap:
    """Overlap of a network's attention with the objects of a photo.

    Attributes:
        jaccard: Intersection over union of each object and the mask of its best head, averaged over the objects.
        heads: Number of the best head of each object, from 1.
        per_head: Intersection over union of each head's mask, averaged over the objects. [heads]
    """

    jaccard: float
    heads: tuple[int, ...]
    per_head: tuple[float, ...]


def overlap(maps: AttentionMaps, objects: Sequence[NDArray[np.bool_]], keep: float) -> Overlap:
    """Compare the mask of each head, at the photo's resolution, with the objects of a photo.

    Args:
        maps: Attention maps of the photo.
        objects: Masks of one or more objects. [H, W] each
        keep: Share of the attention that the masks hold; 0.6 in the paper.

    Source: section 4.2.2 of the paper, with the protocol of facebookresearch/dino issue 54.
    """
    height, width = objects[0].shape
    masks = enlarge(maps.masks(keep), height, width, maps.margins).astype(bool)
    scores = np.array([[jaccard(mask, truth) for truth in objects] for mask in masks])  # [heads, objects]
    best = tuple(int(head) + 1 for head in scores.argmax(0))
    return Overlap(float(scores.max(0).mean()), best, tuple(scores.mean(1).tolist()))


def default_size(encoder: Encoder, tiled: Pixels | None = None) -> int:
    """Return the default short side for photos: 480 pixels for a network trained at 224, others in proportion.

    Args:
        encoder: Encoder of the photos.
        tiled: Photo that is cut into tiles: its own short side if that is larger. [H, W, C]
    """
    patch = encoder.backbone.patch_size
    side = max(patch, round(encoder.size * 480 / 224 / patch) * patch)
    return side if tiled is None else max(side, min(tiled.shape[:2]))


def attention_maps(encoder: Encoder, pixels: Pixels, short_side: int, tile: int | None = None) -> AttentionMaps:
    """Compute the attention maps of a photo of any size and shape.

    Args:
        encoder: Encoder with a vision transformer.
        pixels: Pixels of the photo. [H, W, C]
        short_side: Short side in pixels after resizing; both sides are then rounded to whole patches, so that the map
            covers the whole photo.
        tile: Side of the overlapping tiles that a larger photo is cut into, in pixels after resizing. The class token
            of each tile attends to its own tile only. If None, no tiles.

    Raises:
        DinoError: If the backbone has no attention, or the tile does not fit its patches.
    """
    made = photo_map(encoder, pixels, short_side, lambda image: encoder.attention(image)[0].float(), tile)
    return AttentionMaps((made.values * made.tile_share).cpu().numpy(), made.margins, made.reduced_to)


def keep_mass(maps: NDArray[np.floating], keep: float) -> NDArray[np.bool_]:
    """Return the smallest mask that holds a share `keep` of each map's sum. [..., rows, columns]

    Source: facebookresearch/dino@7c446df visualize_attention.py.
    """
    flat = maps.reshape(*maps.shape[:-2], -1)
    order = flat.argsort(-1, kind="stable")
    mass = np.take_along_axis(flat, order, -1)
    total = mass.sum(-1, keepdims=True)  # 0 if the class token attends only to itself; the mask is then empty
    inside = np.cumsum(mass / np.where(total > 0, total, 1), -1) > 1 - keep
    masks = np.zeros(flat.shape, dtype=bool)
    np.put_along_axis(masks, order, inside, -1)
    return masks.reshape(maps.shape)


def jaccard(mask: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    """Return the intersection over union of two masks; 1 if both are empty. Both [H, W]."""
    either = (mask | truth).sum()
    return float((mask & truth).sum() / either) if either else 1.0


def enlarge(
    maps: NDArray[np.generic], height: int, width: int, margins: tuple[float, float] = (0.0, 0.0)
) -> NDArray[np.generic]:
    """Enlarge maps [..., rows, columns] to a photo's size by repeating values, without interpolation.

    Args:
        maps: Maps to enlarge.
        height: Height of the photo, in pixels.
        width: Width of the photo, in pixels.
        margins: Share of the height, and of the width, beyond the maps at each end, where their edge is repeated.
    """
    rows = _repeat(maps.shape[-2], height, margins[0])
    columns = _repeat(maps.shape[-1], width, margins[1])
    return maps[..., rows[:, None], columns]


def _repeat(count: int, length: int, margin: float) -> NDArray[np.int64]:
    """Return the row of a map, or its column, for each pixel along a side."""
    inner = max(1, round(length * (1 - 2 * margin)))
    pixels: NDArray[np.int64] = np.clip(np.arange(length) - (length - inner) // 2, 0, inner - 1)
    return pixels * count // inner
