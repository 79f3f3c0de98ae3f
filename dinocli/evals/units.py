"""Scaling of features to length 1, without overflow or underflow."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

Floats = NDArray[np.float32]

# Squares of float32 overflow above 1e19 and lose digits below 1e-17; lengths between these limits are safe.
_SHORTEST, _LONGEST = 1e-12, 1e18


def unit(values: NDArray[Any]) -> Floats:
    """Scale rows to length 1, so that products are cosines; zero rows stay zero. [S, D] -> [S, D], float32"""
    values = np.ascontiguousarray(values, dtype=np.float32)
    with np.errstate(over="ignore"):
        length = np.sqrt(np.einsum("sd,sd->s", values, values))
    scaled = values / np.maximum(length, _SHORTEST)[:, None]
    extreme = np.flatnonzero(~((length > _SHORTEST) & (length < _LONGEST)))
    if len(extreme):
        wide = values[extreme].astype(np.float64)  # squares of any float32 fit in float64
        length = np.sqrt(np.einsum("sd,sd->s", wide, wide))[:, None]
        scaled[extreme] = np.divide(wide, length, out=np.zeros_like(wide), where=length > 0)
    return scaled


def normalized(features: Tensor) -> Tensor:
    """Scale features to length 1 on any device; zero rows stay zero. [..., D] of float32 or float64"""
    # Scaling by the largest number first prevents overflow of the squares; a power of two changes no other bit.
    largest = features.abs().amax(-1, keepdim=True)
    scaled = torch.ldexp(features, -torch.frexp(largest).exponent.clamp(-126, 126))
    return F.normalize(scaled, dim=-1)
