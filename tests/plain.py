"""DINO's networks written plainly from their description, over the original's own keys: an oracle for what is stored nowhere.

Where numbers of the original are stored, these functions are held against them first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Mapping[str, Tensor]


def norm(x: Tensor, weights: Weights, key: str) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    scaled = centered / (centered.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return scaled * weights[f"{key}.weight"] + weights[f"{key}.bias"]


def linear(x: Tensor, weights: Weights, key: str) -> Tensor:
    return x @ weights[f"{key}.weight"].T + weights[f"{key}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def positions(table: Tensor, height: int, width: int, patch: int) -> Tensor:
    """The learned positions of an image, scaled by a tenth more than its patches ask for. [1, 1+N, D]"""
    rows, columns, side = height // patch, width // patch, round(math.sqrt(table.shape[1] - 1))
    if rows * columns == side * side and height == width:
        return table
    grid = table[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    scale = ((rows + 0.1) / side, (columns + 0.1) / side)
    grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
    return torch.cat([table[:, :1], grid.permute(0, 2, 3, 1).reshape(1, rows * columns, -1)], 1)


def vit(weights: Weights, images: Tensor, heads: int) -> tuple[list[Tensor], Tensor]:
    """Tokens after each block, each through the final norm [B, 1+N, D]; attention of the last [B, heads, 1+N, 1+N]."""
    kernel = weights["patch_embed.proj.weight"]
    width, patch = kernel.shape[0], kernel.shape[-1]
    pixels = F.unfold(images[..., : images.shape[2] // patch * patch, :], patch, stride=patch)  # [B, C*p*p, N]
    tokens = pixels.transpose(1, 2) @ kernel.reshape(width, -1).T + weights["patch_embed.proj.bias"]
    tokens = torch.cat([weights["cls_token"].expand(len(images), -1, -1), tokens], 1)
    tokens = tokens + positions(weights["pos_embed"], *images.shape[-2:], patch)
    outputs = []
    for block in range(1 + max(int(key.split(".")[1]) for key in weights if key.startswith("blocks."))):
        key = f"blocks.{block}"
        qkv = linear(norm(tokens, weights, f"{key}.norm1"), weights, f"{key}.attn.qkv")
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.split(width, -1))
        attention = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(width // heads), -1)
        mixed = (attention @ v).transpose(1, 2).flatten(2)
        tokens = tokens + linear(mixed, weights, f"{key}.attn.proj")
        hidden = gelu(linear(norm(tokens, weights, f"{key}.norm2"), weights, f"{key}.mlp.fc1"))
        tokens = tokens + linear(hidden, weights, f"{key}.mlp.fc2")
        outputs.append(norm(tokens, weights, "norm"))
    return outputs, attention


def head(weights: Weights, x: Tensor, *, layers: int, batch_norm: bool) -> Tensor:
    """Logits of features [S, D]: MLP with BatchNorm before each GELU, unit length, weight-normed prototypes. [S, K]"""
    index = 0
    for layer in range(layers):
        x = linear(x, weights, f"mlp.{index}" if layers > 1 else "mlp")
        if layer < layers - 1:
            if batch_norm:
                index += 1
                x = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()
                x = x * weights[f"mlp.{index}.weight"] + weights[f"mlp.{index}.bias"]
            x, index = gelu(x), index + 2
    x = x / x.norm(dim=-1, keepdim=True)
    v = weights["last_layer.weight_v"]
    return x @ (weights["last_layer.weight_g"] * v / v.norm(dim=1, keepdim=True)).T
