"""Draws of one view that leave the crops as they are, for tests that change one of them."""

from __future__ import annotations

import torch
from torch import Tensor


def nothing(batch: int = 1) -> dict[str, Tensor]:
    """Return draws that change no image."""
    return {
        "flip": torch.zeros(1, batch, dtype=torch.bool),
        "factors": torch.tensor([1.0, 1.0, 1.0, 0.0]).expand(1, batch, 4).clone(),
        "order": torch.arange(4, dtype=torch.uint8).expand(1, batch, 4).clone(),
        "gray": torch.zeros(1, batch, dtype=torch.bool),
        "radius": torch.zeros(1, batch),
        "solarize": torch.zeros(1, batch, dtype=torch.bool),
    }
