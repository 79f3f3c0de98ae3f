"""Learned positions for other grids of patches than their own."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dinocli.precision import exactly

Positions = Literal["dino", "antialias"]


class Resampler:
    """Takes learned positions to other grids; what a grid needs is worked out once.

    Args:
        how: `dino` scales by (rows + 0.1) / side, bicubic, no antialias: the sampling points then really lie at that
            scale, which is not the same as asking for the size. `antialias` asks for the size.
        prefix: How many positions belong to class and register tokens.

    Source: facebookresearch/dino@7c446df vision_transformer.py, interpolate_pos_encoding; timm resample_abs_pos_embed.
    """

    def __init__(self, how: Positions, prefix: int) -> None:
        self.how, self.prefix = how, prefix
        self._kept: dict[tuple[int, int, torch.dtype, torch.device], Tensor] = {}

    def __call__(self, positions: Tensor, grid: tuple[int, int], *, square: bool = True) -> Tensor:
        """Positions for another grid of patches.

        Args:
            positions: Those of the prefix, which stay as they are, then those of a square grid. [1, prefix+M, D]
            grid: Rows and columns wanted.
            square: Whether the image is. The original resamples for any other image, even onto the grid that is there.

        Returns:
            [1, prefix+N, D]
        """
        side = round((positions.shape[1] - self.prefix) ** 0.5)
        if grid == (side, side) and (square or self.how != "dino"):
            return positions
        of_rows, of_columns = (self._weights(side, count, positions) for count in grid)
        table = positions[0, self.prefix :].unflatten(0, (side, side))  # [side, side, D]
        # Two products, whose gradient on a GPU is the same each time; they are small, and so need not be coarse.
        with exactly(positions.device):
            table = of_columns @ (of_rows @ table.flatten(1)).unflatten(1, (side, -1))  # [rows, columns, D]
        return torch.cat([positions[:, : self.prefix], table.flatten(0, 1)[None]], dim=1)

    def _weights(self, side: int, count: int, like: Tensor) -> Tensor:
        """How much each of `count` places in a row draws on each of `side`. [count, side]"""
        if torch.compiler.is_compiling():  # what is traced holds no numbers that could be kept
            return _weights(side, count, self.how, like)
        key = (side, count, like.dtype, like.device)
        if key not in self._kept:
            self._kept[key] = _weights(side, count, self.how, like)
        return self._kept[key]


def _weights(side: int, count: int, how: Positions, like: Tensor) -> Tensor:
    # A table in which place i along the rows is 1 and all else 0, for each i: what becomes of it is column i.
    each = torch.eye(side, dtype=like.dtype, device=like.device)[None, :, :, None].expand(1, side, side, side)
    if how == "dino":
        made = F.interpolate(each, scale_factor=((count + 0.1) / side, 1.0), mode="bicubic", align_corners=False)
    else:
        made = F.interpolate(each, size=(count, side), mode="bicubic", align_corners=False, antialias=True)
    return made[0, :, :, 0].T.contiguous()
