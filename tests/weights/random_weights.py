"""Random weights large enough that a wrong key, token or normalization changes the features."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def fill(model: nn.Module, seed: int = 0) -> None:
    """Fill all parameters and running statistics with random values; gains and variances stay near 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in sorted(model.state_dict().items()):
        if not value.is_floating_point() or "periods" in name or "inv_freq" in name:
            continue
        noise = torch.randn(value.shape, generator=generator)
        near_one = value.ndim <= 1 and not name.endswith("bias") and "mean" not in name
        value.copy_((1 + 0.1 * noise).abs() if near_one else 0.1 * noise)


def largest_difference(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest absolute difference; features have a standard deviation of about 1 after the final norm."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max()) if ours.numel() else 0.0
