"""Crops of all colors, and their views in bytes, for the tests of both ways to make them."""

from __future__ import annotations

import torch
from torch import Tensor

from dinocli.data.views.augment_bytes import ByteAugmenter, changes
from dinocli.data.views.compiled_bytes import CompiledByteAugmenter
from dinocli.data.views.crops import Draws, JitterConfig

JITTER = JitterConfig(probability=0.8, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
WILD = JitterConfig(probability=1, brightness=1, contrast=1, saturation=1, hue=0.5)
SIZES = [8, 17, 18, 19, 50]


def some_crops(size: int, images: int = 1, channels: int = 3) -> Tensor:
    """Return noise, edges and flat areas: all colors with all neighbours. [1, B, H, H, C]"""
    generator = torch.Generator().manual_seed(0)
    crops = torch.randint(0, 256, (1, images, size, size, channels), dtype=torch.uint8, generator=generator)
    crops[:, :, : size // 2, : size // 3] = torch.tensor([0, 255] * channels, dtype=torch.uint8)[:channels]
    crops[:, :, size // 2 :, : size // 3] //= 64
    crops[:, :, size // 2 :, : size // 3] *= 85
    return crops


def in_bytes(crops: Tensor, drawn: Draws, library: str | None = None) -> Tensor:
    """Return the views in levels. [V, B, C, H, H]"""
    made, (size, channels) = crops.clone(), crops.shape[3:]
    augmenter = CompiledByteAugmenter(channels, size, library) if library else ByteAugmenter(channels, size)
    for view, steps in zip(made, changes(drawn, [size] * len(crops)), strict=True):
        for crop, one in zip(view, steps, strict=True):
            augmenter(crop, one)
    return made.view(*crops.shape[:2], channels, size, size)
