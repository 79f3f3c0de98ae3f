"""Spread: figures without labels that tell features which differ from those that have collapsed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dinocli.evals.units import normalized


def effective_rank(features: Tensor) -> float:
    """How many directions features use: 1 where all are alike, up to the smaller of S and D.

    They are not centered first: features that are alike but for some noise would else use every direction.

    Args:
        features: [S, D]

    Returns:
        NaN where a feature is not finite.

    Source: exp of the entropy of the singular values' shares, Roy and Vetterli 2007; arXiv 2210.02885 (RankMe).
    """
    if not features.isfinite().all():
        return math.nan
    sizes = torch.linalg.svdvals(features.double())
    shares = sizes / sizes.sum().clamp(min=torch.finfo(sizes.dtype).tiny)
    return float(torch.special.entr(shares).sum().exp())


def uniformity(features: Tensor) -> float:
    """How evenly features lie on the sphere: 0 where all are alike, about -4 where they fill it.

    Args:
        features: At least two. [S, D]

    Returns:
        The logarithm of exp(-2 d**2), averaged over pairs at a distance d after normalization.

    Source: arXiv 2005.10242, section 4.1.
    """
    distances = torch.pdist(normalized(features.double()))
    return float((-2 * distances**2).exp().mean().log())
