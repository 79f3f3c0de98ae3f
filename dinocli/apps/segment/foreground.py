"""Foreground: the main object of a photo, found without training by attention, a cut or its border."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinocli.data.decode.pixels import Pixels
from dinocli.evals.attention import attention_maps, keep_mass
from dinocli.evals.components import component_at, largest_component
from dinocli.evals.units import normalized
from dinocli.features.encoder import Encoder
from dinocli.models.backbone import Facet
from dinocli.models.transformer import Transformer

By = Literal["attention", "cut", "border"]
Map = NDArray[np.float64]
Mask = NDArray[np.bool_]

KEEP, TAU = 0.6, 0.2
MOST_PATCHES = 6400  # for a cut: its float64 matrix takes 0.3 GB, and three of them are in memory
_EXACT = 512  # largest number of patches to compute all eigenvectors for, in a tenth of a second
_EPS = 1e-5
_SHRINK = 0.3  # added to the variances at the border, as a share of their mean: a border has few patches
_LEAST_SIDE = 3  # rows or columns of patches, so that some are not at the border


@dataclass(frozen=True)
class Foreground:
    """Foreground of a photo, per patch.

    Attributes:
        values: Foreground score per patch: its share of the attention, its entry in the eigenvector of the cut, or its
            distance from the border. Those of the foreground of a cut or a border are above the mean. [rows, columns]
        mask: Foreground in one component; empty if none was found. [rows, columns]
    """

    values: Map
    mask: Mask


def foreground(
    encoder: Encoder, pixels: Pixels, short_side: int, by: By, *, keep: float = KEEP, tau: float = TAU
) -> Foreground:
    """Find the foreground of a photo of any size and shape.

    Args:
        encoder: Encoder; convolutional networks have no attention.
        pixels: Pixels of the photo. [H, W, C]
        short_side: Short side in pixels after resizing. Except for attention, larger photos are reduced to about 6,400
            patches.
        by: `attention` for the fewest patches that hold `keep` of the class token's attention, averaged over heads;
            `cut` and `border` for the functions of these names.
        keep: Share of the attention that the foreground holds.
        tau: Cosine of two patches' keys above which they are joined.

    Raises:
        DinoError: If `by` is attention and the backbone has none.
    """
    if by == "attention":
        mass = attention_maps(encoder, pixels, short_side).heads.mean(0).astype(np.float64)
        return Foreground(mass, largest_component(keep_mass(mass, keep)))
    image = encoder.photo(pixels, short_side, MOST_PATCHES)
    # A convolutional network has no keys; its output features are used instead.
    facet: Facet = "key" if isinstance(encoder.backbone, Transformer) else "token"
    features = encoder.patches(image, facet=facet)[0]
    return cut(features, tau) if by == "cut" else border(features)


def cut(features: Tensor, tau: float = TAU) -> Foreground:
    """Split patches in two so that similar ones stay together: TokenCut.

    A graph joins all patches with weight 1 if their cosine is above tau, else 1e-5. The second-smallest eigenvector of
    the generalized Laplacian, (D - W) y = lambda D y, gives its normalized cut. One side is above the eigenvector's
    mean. The foreground is the side of the patch with the largest absolute value, reduced to the component with that
    patch. If all pairs of patches are similar, or none is, the foreground is empty.

    Args:
        features: Features per patch, on any device. [rows, columns, D]
        tau: Cosine above which two patches are joined.

    Source: Wang et al., TokenCut, arXiv 2202.11539, section 3, and its supplement.
    """
    rows, columns, _ = features.shape
    units = normalized(features.flatten(0, 1).cpu().double())
    similar = units @ units.T > tau  # [N, N]
    similar.fill_diagonal_(True)
    joined = int(similar.sum()) - len(similar)
    if joined in (0, len(similar) * (len(similar) - 1)):
        return Foreground(np.zeros((rows, columns)), np.zeros((rows, columns), dtype=bool))
    weights = torch.where(similar, 1.0, _EPS).double()
    vector = _find_second_eigenvector(weights).numpy().reshape(rows, columns)
    seed = np.unravel_index(int(np.abs(vector).argmax()), vector.shape)
    vector = vector if vector[seed] > vector.mean() else -vector
    return Foreground(vector, component_at(vector > vector.mean(), (int(seed[0]), int(seed[1]))))


def border(features: Tensor) -> Foreground:
    """Find the patches that are unlike those at the photo's border, which mostly show background.

    The score of a patch is its squared Mahalanobis distance to the features at the border. The foreground is the
    largest component of patches above the mean score. It is empty if the photo has fewer than three rows or columns of
    patches, or all patches at the border are equal.

    Args:
        features: Features per patch, on any device. [rows, columns, D]

    Source: for colors of pixels, Zhang et al., Minimum Barrier Salient Object Detection, ICCV 2015, section 4.
    """
    rows, columns, width = features.shape
    values = features.flatten(0, 1).cpu().double()
    inner = torch.zeros(rows, columns, dtype=torch.bool)
    inner[1:-1, 1:-1] = True
    at_border = values[~inner.flatten()]
    mean = at_border.mean(0)
    covariance = (at_border - mean).T @ (at_border - mean) / len(at_border)
    spread = covariance.diagonal().mean()
    if min(rows, columns) < _LEAST_SIDE or not spread:
        return Foreground(np.zeros((rows, columns)), np.zeros((rows, columns), dtype=bool))
    covariance += _SHRINK * spread * torch.eye(width, dtype=torch.float64)
    apart = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), (values - mean).T, upper=False)  # [D, N]
    scores = apart.square().sum(0).numpy().reshape(rows, columns)
    return Foreground(scores, largest_component(scores > scores.mean()))


def _find_second_eigenvector(weights: Tensor) -> Tensor:
    """Return the second-smallest eigenvector y of (D - W) y = lambda D y. [N, N] -> [N]

    With z = sqrt(D) y, it is the second-largest eigenvector of the normalized weights; the largest is sqrt(D). Above
    512 patches, the largest is subtracted and LOBPCG finds the second.
    """
    root = weights.sum(1).sqrt()
    scaled = weights.div_(root[:, None]).div_(root)  # [N, N], in place: it is large
    if len(root) <= _EXACT:
        return torch.linalg.eigh(scaled).eigenvectors[:, -2] / root
    top = root / root.norm()
    scaled.sub_(torch.outer(top, top))
    start = torch.randn(len(root), 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    _, vectors = torch.lobpcg(scaled, X=start, niter=500, tol=1e-8)
    return vectors[:, 0] / root
