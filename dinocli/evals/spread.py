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


def lidar(views: Tensor, delta: float = 1e-4, eps: float = 1e-8) -> float:
    """Compute the effective rank of the differences between images, relative to those between views of an image.

    Args:
        views: Features of Q views of each of S images, grouped by image. At most S - 1 is possible, so S above D is
            best. [S, Q, D]
        delta: Added to the variances within images, which may be 0.
        eps: Added to the eigenvalues, so that their logarithms are finite.

    Returns:
        LiDAR score; NaN if a feature is not finite.

    Raises:
        ValueError: If there are fewer than two images or two views.

    Source: arXiv 2312.04000, section 4; delta and eps as in its code.
    """
    images, count, width = views.shape
    if images < 2 or count < 2:
        raise ValueError(f"{images} images with {count} views; expected at least two of each")
    if not views.isfinite().all():
        return math.nan
    wide = views.double()
    means = wide.mean(1)  # [S, D]
    between = torch.cov(means.T).reshape(width, width)
    deviations = (wide - means[:, None]).flatten(0, 1)  # [S * Q, D]
    within = deviations.T @ deviations / (images * (count - 1)) + delta * torch.eye(width, dtype=wide.dtype)
    values, vectors = torch.linalg.eigh(within)
    whitening = vectors * values.rsqrt() @ vectors.T
    strengths = torch.linalg.eigvalsh(whitening @ between @ whitening).clamp(min=0)
    shares = (strengths + eps) / (strengths + eps).sum()
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
