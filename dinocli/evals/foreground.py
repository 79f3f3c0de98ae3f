"""Foreground: the main thing of a photo, told without training by attention or by a cut through its patches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinocli.data.decode import Pixels
from dinocli.encoder import Encoder
from dinocli.evals.attention import attention_maps, keep_mass
from dinocli.evals.components import component_at, largest_component
from dinocli.evals.units import normalized
from dinocli.models.backbone import Facet, Transformer

By = Literal["attention", "cut"]
Map = NDArray[np.float64]
Mask = NDArray[np.bool_]

KEEP, TAU = 0.6, 0.2
MOST_PATCHES = 6400  # of a cut: a table of each with each, 8 bytes a number, is 0.3 GB, and is held three times
_EXACT = 512  # patches up to which all eigenvectors are worked out: a tenth of a second
_EPS = 1e-5


@dataclass(frozen=True)
class Foreground:
    """What was told apart in a photo, a place a patch.

    Attributes:
        values: How much each patch belongs to the foreground: its share of the attention, or its number in the
            eigenvector of the cut, which is above the mean in the foreground. [rows, columns]
        mask: The foreground, in one piece; nothing where there is none. [rows, columns]
    """

    values: Map
    mask: Mask


def foreground(
    encoder: Encoder, pixels: Pixels, short_side: int, by: By, *, keep: float = KEEP, tau: float = TAU
) -> Foreground:
    """Tell the foreground of a photo of any size and shape.

    Args:
        encoder: A vision transformer; a convolutional network can be cut, but has no attention.
        pixels: [H, W, C]
        short_side: What to resize the photo's short side to, in pixels; a cut takes some 6,400 patches at most, and
            looks at a photo of more coarsely.
        by: `attention`, the fewest patches that hold `keep` of what the class token looks at, averaged over the heads;
            or `cut`, see `cut`.
        keep: Share of the attention.
        tau: Cosine of two patches' keys from which they are alike.

    Raises:
        DinoError: Attention was asked for and the backbone has none.
    """
    if by == "attention":
        mass = attention_maps(encoder, pixels, short_side).heads.mean(0).astype(np.float64)
        return Foreground(mass, largest_component(keep_mass(mass, keep)))
    image = encoder.photo(pixels, short_side, MOST_PATCHES)
    # A convolutional network has no keys; what comes out of it parts photos too.
    facet: Facet = "key" if isinstance(encoder.backbone, Transformer) else "token"
    return cut(encoder.patches(image, facet=facet)[0], tau)


def cut(features: Tensor, tau: float = TAU) -> Foreground:
    """Part patches in two so that those that are alike stay together: TokenCut.

    A graph joins all patches, by 1 where the cosine of two is above tau and by 1e-5 elsewhere. Its normalized cut is
    told by the second-smallest eigenvector of the generalized Laplacian, (D - W) y = lambda D y: one side is above its
    mean. The foreground is the side of the patch with the largest absolute value, and of it the piece that holds that
    patch. Where all patches are alike, or none are, there is no cut and no foreground.

    Args:
        features: Of each patch, on any device. [rows, columns, D]
        tau: The cosine.

    Source: Wang et al., TokenCut, arXiv 2202.11539, section 3, and its supplement.
    """
    rows, columns, _ = features.shape
    unit = normalized(features.flatten(0, 1).cpu().double())
    alike = unit @ unit.T > tau  # [N, N]
    alike.fill_diagonal_(True)
    joined = int(alike.sum()) - len(alike)
    if joined in (0, len(alike) * (len(alike) - 1)):
        return Foreground(np.zeros((rows, columns)), np.zeros((rows, columns), dtype=bool))
    weights = torch.where(alike, 1.0, _EPS).double()
    vector = _second(weights).numpy().reshape(rows, columns)
    seed = np.unravel_index(int(np.abs(vector).argmax()), vector.shape)
    vector = vector if vector[seed] > vector.mean() else -vector
    return Foreground(vector, component_at(vector > vector.mean(), (int(seed[0]), int(seed[1]))))


def _second(weights: Tensor) -> Tensor:
    """The second-smallest y of (D - W) y = lambda D y. [N, N] -> [N]

    With z = sqrt(D) y it is the second-largest eigenvector of the normalized weights, of which the largest is sqrt(D).
    For more than 512 patches it is found by LOBPCG, with that one taken out.
    """
    root = weights.sum(1).sqrt()
    normalized = weights.div_(root[:, None]).div_(root)  # [N, N], in place: it is large
    if len(root) <= _EXACT:
        return torch.linalg.eigh(normalized).eigenvectors[:, -2] / root
    top = root / root.norm()
    normalized.sub_(torch.outer(top, top))
    start = torch.randn(len(root), 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    _, vectors = torch.lobpcg(normalized, X=start, niter=500, tol=1e-8)
    return vectors[:, 0] / root
