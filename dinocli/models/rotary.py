"""Rotary positions: queries and keys rotated by the position of their patch, on any grid."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import RotaryEmbeddingDinoV3  # type: ignore[attr-defined]
from torch import Tensor


class Rotary:
    """Rotation of queries and keys on a grid of patches; the angles of each grid are computed once.

    On any grid, the coordinates of patch centers lie between -1 and 1. The first half of a head's angles depends on the
    row, the second on the column, each with the same d/4 periods.

    Args:
        prefix: Number of class and register tokens, which have no position and are not rotated.

    Source: DINOv3, section 3.2 (arXiv:2508.10104); timm RotaryEmbeddingDinoV3.
    """

    def __init__(self, prefix: int) -> None:
        self.prefix = prefix
        self._cache: dict[tuple[int, int, int, torch.dtype, torch.device], Tensor] = {}

    @staticmethod
    def reads(rope: Any) -> bool:
        """Return True if this class supports a timm model's rotary positions."""
        return (
            type(rope) is RotaryEmbeddingDinoV3
            and rope.rotate_half
            and (rope.normalize_coords, rope.grid_indexing, rope.grid_offset) == ("separate", "ij", 0)
            and not rope.aug_active
        )

    def __call__(
        self, periods: Tensor, grid: tuple[int, int], rescale: float = 1.0, jitter: float = 1.0, steps: int = 1
    ) -> Tensor:
        """Return cosines and sines of the angles on a grid.

        Args:
            periods: Periods of the angles, in half-widths of an image. [d/4]
            grid: Rows and columns.
            rescale: Largest random factor on the coordinates. One factor for all images is drawn log-uniformly between
                1/rescale and rescale, on the device, so that the host does not wait. If 1, nothing is drawn.
            jitter: The same for two separate factors on rows and columns.
            steps: Positions per patch side, for patches that overlap; there are then (rows - 1) * steps + 1 rows.

        Returns:
            [2, 1+R+N, d/2]
        """
        angles = self._get_angles(periods, grid, steps)
        if jitter != 1:
            most = math.log(jitter)
            factors = angles.new_empty(2, 1).uniform_(-most, most).exp()
            angles = (angles.unflatten(-1, (2, -1)) * factors).flatten(-2)  # the first half is of the rows
        if rescale != 1:
            most = math.log(rescale)
            angles = angles * angles.new_empty(1).uniform_(-most, most).exp()
        return torch.stack([angles.cos(), angles.sin()])

    def _get_angles(self, periods: Tensor, grid: tuple[int, int], steps: int = 1) -> Tensor:
        if torch.compiler.is_compiling():  # traced tensors have no values to cache
            return _compute_angles(periods, grid, self.prefix, steps)
        key = (*grid, steps, periods.dtype, periods.device)
        if key not in self._cache:
            self._cache[key] = _compute_angles(periods, grid, self.prefix, steps)
        return self._cache[key]


def _compute_angles(periods: Tensor, grid: tuple[int, int], prefix: int, steps: int) -> Tensor:
    """Compute the angles of all tokens, which are 0 for those without a position. [1+R+N, d/2]"""
    # Coordinates are computed on the CPU in float32, as in timm, for the same bits on every device.
    rows, columns = (2 * (_list_centers(count, steps) / count) - 1 for count in grid)
    coordinates = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).flatten(0, 1)  # [N, 2]
    angles = 2 * math.pi * coordinates[..., None].to(periods) / periods  # [N, 2, d/4]
    return F.pad(angles.flatten(1), (0, 0, prefix, 0))


def _list_centers(count: int, steps: int) -> Tensor:
    """Return the centers of `count` patches and of those between them, in patches. [(count - 1) * steps + 1]"""
    return torch.arange((count - 1) * steps + 1, dtype=torch.float32, device="cpu") / steps + 0.5


def turned(values: Tensor, rotation: Tensor) -> Tensor:
    """Rotate queries or keys: each pair of channels that are d/2 apart, by its angle. [B, heads, T, d]

    Args:
        values: [B, heads, T, d]
        rotation: Cosines and sines, which may have a higher precision than the values. [2, T, d/2]
    """
    cos, sin = rotation
    first, second = values.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(values.dtype)
