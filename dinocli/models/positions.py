"""Learned positions, interpolated to other grids of patches."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dinocli.core.device import exactly

Positions = Literal["dino", "bicubic", "antialias"]


class Resampler:
    """Interpolation of learned positions; the weights for each grid are computed once.

    Args:
        how: `dino` scales by (rows + 0.1) / side, bicubic, no antialias; its sampling points follow this exact factor,
            not the rounded size. `bicubic` interpolates to the size without antialias, `antialias` with it.
        prefix: Number of positions of class and register tokens.

    Source: facebookresearch/dino@7c446df vision_transformer.py, interpolate_pos_encoding; timm resample_abs_pos_embed.
    """

    def __init__(self, how: Positions, prefix: int) -> None:
        self.how, self.prefix = how, prefix
        self._cache: dict[tuple[int, int, bool, int, torch.dtype, torch.device], Tensor] = {}

    def __call__(self, positions: Tensor, grid: tuple[int, int], *, square: bool = True, steps: int = 1) -> Tensor:
        """Interpolate positions to another grid of patches.

        Args:
            positions: Positions of the prefix, which are not changed, then those of a square grid. [1, prefix+M, D]
            grid: Rows and columns of the result.
            square: True if the image is square. For other images, `dino` interpolates even to the same grid, as the
                original does.
            steps: Positions per patch side, for patches that overlap. Those between whole patches are interpolated
                between the positions of these, bicubic.

        Returns:
            [1, prefix+N, D], with N = ((rows - 1) * steps + 1) * ((columns - 1) * steps + 1)
        """
        side = round((positions.shape[1] - self.prefix) ** 0.5)
        if isinstance(grid[0], torch.SymInt) and steps == 1:
            return self._trace(positions, side, grid)
        own = grid == (side, side) and (square or self.how != "dino")
        if own and steps == 1:
            return positions
        return self._apply(positions, side, *(self._get_weights(side, count, own, steps, positions) for count in grid))

    def _apply(self, positions: Tensor, side: int, of_rows: Tensor, of_columns: Tensor) -> Tensor:
        table = positions[0, self.prefix :].unflatten(0, (side, side))  # [side, side, D]
        # As two matrix products, whose gradient is deterministic on a GPU. They are small: full precision costs little.
        with exactly(positions.device):
            table = of_columns @ (of_rows @ table.flatten(1)).unflatten(1, (side, -1))  # [rows, columns, D]
        return torch.cat([positions[:, : self.prefix], table.flatten(0, 1)[None]], dim=1)

    def _trace(self, positions: Tensor, side: int, grid: tuple[int, int]) -> Tensor:
        """Interpolate to a grid that is free in an exported graph, for images of whole patches."""
        counts = [torch.ones(count, dtype=positions.dtype, device=positions.device).sum() for count in grid]
        native = (counts[0] == side) & (counts[1] == side)
        extra = torch.where(native, 0.0, 0.1) if self.how == "dino" else 0.0  # square images keep their positions
        weights = (
            _trace_weights(side, torch.arange(count, device=positions.device), side / (number + extra), self.how)
            for count, number in zip(grid, counts, strict=True)
        )
        return self._apply(positions, side, *weights)

    def _get_weights(self, side: int, count: int, own: bool, steps: int, like: Tensor) -> Tensor:
        """Return the interpolation weights from `side` positions along an axis. [(count - 1) * steps + 1, side]"""
        if torch.compiler.is_compiling():  # traced tensors have no values to cache
            return _compute_weights(side, count, self.how, own, steps, like)
        key = (side, count, own, steps, like.dtype, like.device)
        if key not in self._cache:
            self._cache[key] = _compute_weights(side, count, self.how, own, steps, like)
        return self._cache[key]


def _compute_weights(side: int, count: int, how: Positions, own: bool, steps: int, like: Tensor) -> Tensor:
    weights = torch.eye(side, dtype=like.dtype, device=like.device) if own else _compute_whole(side, count, how, like)
    if steps == 1:
        return weights
    # With aligned corners, every `steps`-th row is a whole patch, and keeps its weights.
    size = ((count - 1) * steps + 1, side)
    return F.interpolate(weights[None, None], size=size, mode="bicubic", align_corners=True)[0, 0]


def _compute_whole(side: int, count: int, how: Positions, like: Tensor) -> Tensor:
    # Channel i is a table with 1 in row i and 0 elsewhere; its interpolation is column i of the weights.
    tables = torch.eye(side, dtype=like.dtype, device=like.device)[None, :, :, None].expand(1, side, side, side)
    if how == "dino":
        scale = ((count + 0.1) / side, 1.0)
        weights = F.interpolate(tables, scale_factor=scale, mode="bicubic", align_corners=False)
    else:
        antialias = how == "antialias"
        weights = F.interpolate(tables, size=(count, side), mode="bicubic", align_corners=False, antialias=antialias)
    return weights[0, :, :, 0].T.contiguous()


def _trace_weights(side: int, rows: Tensor, scale: Tensor, how: Positions) -> Tensor:
    """Compute the weights of `_compute_weights` from formulas, because torch exports no interpolation to a free size.

    Args:
        side: Number of positions.
        rows: Indices of the results. [count]
        scale: Positions per result. []
        how: Interpolation.

    Returns:
        [count, side]

    Source: Keys, Cubic Convolution Interpolation for Digital Image Processing, 1981; the constant -0.75 is torch's, and
    -0.5 with antialias.
    """
    centers = (rows[:, None] + 0.5) * scale - 0.5  # [count, 1]
    places = torch.arange(side, device=rows.device)
    if how == "antialias":  # the kernel is as wide as a result, and cut at the border
        weights = _cubic((places - centers) / scale.clamp(min=1), -0.5)
        return weights / weights.sum(1, keepdim=True)
    taps = centers.floor() + torch.arange(-1, 3, device=rows.device)  # [count, 4]
    # Positions beyond the border repeat the last one.
    there = taps.clamp(0, side - 1)[..., None] == places
    return (_cubic(taps - centers, -0.75)[..., None] * there).sum(1)


def _cubic(distance: Tensor, a: float) -> Tensor:
    x = distance.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * a - 4 * a
    return torch.where(x <= 1, near, torch.where(x < 2, far, 0.0))
