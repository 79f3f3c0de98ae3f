"""Attention: what the class token looks at in the last block."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dinocli.data.decode import Pixels
from dinocli.encoder import Encoder


@dataclass(frozen=True)
class AttentionMaps:
    """Maps of one image.

    Attributes:
        heads: The share of its attention that each head gives each patch, the class token's own share left out.
            [heads, rows, columns]
    """

    heads: NDArray[np.float32]

    def masks(self, keep: float) -> NDArray[np.bool_]:
        """For each head the fewest patches that hold `keep` of its attention. [heads, rows, columns]"""
        return keep_mass(self.heads, keep)


def default_size(encoder: Encoder) -> int:
    """The short side to look at a photo with: 480 pixels for a network trained at 224, others in proportion."""
    patch = encoder.backbone.patch_size
    return max(patch, round(encoder.size * 480 / 224 / patch) * patch)


def attention_maps(encoder: Encoder, pixels: Pixels, short_side: int) -> AttentionMaps:
    """Look at a photo of any size and shape.

    Args:
        encoder: A vision transformer.
        pixels: [H, W, C]
        short_side: What to resize the photo's short side to, in pixels; both sides are then rounded to whole patches,
            so that the map covers all of the photo.

    Raises:
        DinoError: The backbone has no attention.
    """
    return AttentionMaps(encoder.attention(encoder.photo(pixels, short_side))[0].float().cpu().numpy())


def keep_mass(maps: NDArray[np.floating], keep: float) -> NDArray[np.bool_]:
    """The fewest places that hold a fraction `keep` of each map's sum. [..., rows, columns]

    Source: facebookresearch/dino@7c446df visualize_attention.py.
    """
    flat = maps.reshape(*maps.shape[:-2], -1)
    order = flat.argsort(-1, kind="stable")
    mass = np.take_along_axis(flat, order, -1)
    whole = mass.sum(-1, keepdims=True)  # 0 if the class token looks at nothing but itself: then no patch is kept
    kept = np.cumsum(mass / np.where(whole > 0, whole, 1), -1) > 1 - keep
    masks = np.zeros(flat.shape, dtype=bool)
    np.put_along_axis(masks, order, kept, -1)
    return masks.reshape(maps.shape)


def jaccard(mask: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    """Overlap of two masks: what both hold over what either holds. Both [H, W]."""
    either = (mask | truth).sum()
    return float((mask & truth).sum() / either) if either else 1.0


def enlarge(maps: NDArray[np.generic], height: int, width: int) -> NDArray[np.generic]:
    """Maps [..., rows, columns] at a photo's size, each place repeated: nothing is made up between patches."""
    rows = np.arange(height) * maps.shape[-2] // height
    columns = np.arange(width) * maps.shape[-1] // width
    return maps[..., rows[:, None], columns]
