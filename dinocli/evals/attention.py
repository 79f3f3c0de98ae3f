"""Attention of the class token in the last block."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dinocli.data.decode.pixels import Pixels
from dinocli.features.encoder import Encoder


@dataclass(frozen=True)
class AttentionMaps:
    """Attention maps of one image.

    Attributes:
        heads: Share of the class token's attention per head and patch, without its attention to itself.
            [heads, rows, columns]
    """

    heads: NDArray[np.float32]

    def masks(self, keep: float) -> NDArray[np.bool_]:
        """Return the smallest mask per head that holds a share `keep` of its attention. [heads, rows, columns]"""
        return keep_mass(self.heads, keep)


def default_size(encoder: Encoder) -> int:
    """Return the default short side for photos: 480 pixels for a network trained at 224, others in proportion."""
    patch = encoder.backbone.patch_size
    return max(patch, round(encoder.size * 480 / 224 / patch) * patch)


def attention_maps(encoder: Encoder, pixels: Pixels, short_side: int) -> AttentionMaps:
    """Compute the attention maps of a photo of any size and shape.

    Args:
        encoder: Encoder with a vision transformer.
        pixels: Pixels of the photo. [H, W, C]
        short_side: Short side in pixels after resizing; both sides are then rounded to whole patches, so that the map
            covers the whole photo.

    Raises:
        DinoError: If the backbone has no attention.
    """
    return AttentionMaps(encoder.attention(encoder.photo(pixels, short_side))[0].float().cpu().numpy())


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


def enlarge(maps: NDArray[np.generic], height: int, width: int) -> NDArray[np.generic]:
    """Enlarge maps [..., rows, columns] to a photo's size by repeating values, without interpolation."""
    rows = np.arange(height) * maps.shape[-2] // height
    columns = np.arange(width) * maps.shape[-1] // width
    return maps[..., rows[:, None], columns]
