"""Spread: label-free measures that detect collapsed features."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dinocli.evals.units import normalized


def effective_rank(features: Tensor) -> float:
    """Compute the effective rank of features: 1 if all point in one direction, at most min(S, D).

    Features are not centered: centering nearly equal features would leave only noise, which has full rank.

    Args:
        features: Features of S images. [S, D]

    Returns:
        Effective rank; NaN if a feature is not finite.

    Source: exp of the entropy of the singular values' shares, Roy and Vetterli 2007; arXiv 2210.02885 (RankMe).
    """
    if not features.isfinite().all():
        return math.nan
    sizes = torch.linalg.svdvals(features.double())
    shares = sizes / sizes.sum().clamp(min=torch.finfo(sizes.dtype).tiny)
    return float(torch.special.entr(shares).sum().exp())


def uniformity(features: Tensor) -> float:
    """Measure how evenly features cover the sphere: 0 if all are equal, about -4 if they fill it.

    Args:
        features: At least two features. [S, D]

    Returns:
        Logarithm of exp(-2 d**2), averaged over pairs at a distance d after normalization.

    Source: arXiv 2005.10242, section 4.1.
    """
    distances = torch.pdist(normalized(features.double()))
    return float((-2 * distances**2).exp().mean().log())
