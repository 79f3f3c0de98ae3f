"""Matching: corresponding positions in two photos, by patch similarity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Points = NDArray[np.float64]  # x and y in pixels of a photo. [P, 2]
SideOf = Literal["box", "image"]
ALPHAS = (0.05, 0.1, 0.15)
_BLOCK = 2048  # patches of A compared with all patches of B at once


@dataclass(frozen=True)
class PatchMap:
    """Patch features of a photo.

    Attributes:
        features: Normalized feature per patch. [h, w, D]
        size: Height and width of the photo, in pixels.
        margins: Share of the height, and of the width, beyond the patches at each end; see `PhotoMap`.
    """

    features: Tensor
    size: tuple[int, int]
    margins: tuple[float, float] = (0.0, 0.0)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the patches."""
        return self.features.shape[0], self.features.shape[1]

    @property
    def centers(self) -> Points:
        """Center of each patch in pixels, row by row. [h*w, 2]"""
        (height, width), (rows, columns), (top, left) = self._inner, self.grid, self._corner
        y, x = np.mgrid[:rows, :columns] + 0.5
        return np.stack([left + x * width / columns, top + y * height / rows], -1).reshape(-1, 2)

    def holding(self, points: Points) -> NDArray[np.int64]:
        """Return the number of the patch that holds each point, or the nearest patch for points beyond the edge. [P]"""
        (height, width), (rows, columns), (top, left) = self._inner, self.grid, self._corner
        column = np.clip((points[:, 0] - left) * columns / width, 0, columns - 1).astype(np.int64)
        row = np.clip((points[:, 1] - top) * rows / height, 0, rows - 1).astype(np.int64)
        return row * columns + column

    @property
    def _corner(self) -> tuple[float, float]:
        """First row and column of the patches, in pixels."""
        return self.size[0] * self.margins[0], self.size[1] * self.margins[1]

    @property
    def _inner(self) -> tuple[float, float]:
        """Height and width of the patches together, in pixels."""
        return self.size[0] * (1 - 2 * self.margins[0]), self.size[1] * (1 - 2 * self.margins[1])


@dataclass(frozen=True)
class Matches:
    """Nearest patches between two photos.

    Attributes:
        forth: Most similar patch of B for each patch of A. [hA*wA]
        back: Most similar patch of A for each patch of B. [hB*wB]
        cosine: Cosine of each patch of A with its match in B. [hA*wA]
    """

    forth: NDArray[np.int64]
    back: NDArray[np.int64]
    cosine: NDArray[np.float32]

    @property
    def mutual(self) -> NDArray[np.int64]:
        """Patches of A that are also the nearest patch of their match in B, the most similar first."""
        itself = np.flatnonzero(self.back[self.forth] == np.arange(len(self.forth)))
        return itself[np.argsort(-self.cosine[itself], kind="stable")]


@dataclass(frozen=True)
class Pck:
    """Percent of correct keypoints (PCK): keypoints whose predicted position is near the true one.

    Attributes:
        alpha: Largest distance, as a share of the longer side of B's keypoint bounding box, or of photo B.
        found: Percent correct with the features.
        same_place: Percent correct for the trivial answer: A's position, scaled to the size of B.
        chance: Expected percent correct for a random patch of B.
    """

    alpha: float
    found: float
    same_place: float
    chance: float


def joint_pca(a: Tensor, b: Tensor, dims: int) -> tuple[Tensor, Tensor]:
    """Project the features of two photos on the principal components of both together. [..., D] -> [..., dims]

    The result has fewer dimensions if the photos have fewer patches or features than `dims`.

    Source: Zhang et al., arXiv 2305.15347, section 3.3 ("co-PCA").
    """
    both = torch.cat([a.flatten(0, -2), b.flatten(0, -2)]).double()
    mean = both.mean(0)
    directions = torch.linalg.eigh((both - mean).T @ (both - mean)).eigenvectors.flip(1)[:, : min(dims, len(both))]
    return ((a.double() - mean) @ directions).to(a.dtype), ((b.double() - mean) @ directions).to(b.dtype)


def match(a: PatchMap, b: PatchMap) -> Matches:
    """Find the nearest patch in the other photo for each patch, by cosine, in blocks of A's patches."""
    ours, theirs = a.features.flatten(0, 1), b.features.flatten(0, 1)
    forth, cosine = [], []
    best = torch.full((len(theirs),), -torch.inf, device=theirs.device)
    back = torch.zeros(len(theirs), dtype=torch.long, device=theirs.device)
    for first in range(0, len(ours), _BLOCK):
        similar = ours[first : first + _BLOCK] @ theirs.T
        values, rows = similar.max(1)
        forth.append(rows)
        cosine.append(values)
        values, rows = similar.max(0)
        back = torch.where(values > best, rows + first, back)
        best = torch.maximum(values, best)
    clamped = torch.cat(cosine).clamp(-1, 1)  # rounding may exceed 1 for equal patches
    return Matches(torch.cat(forth).cpu().numpy(), back.cpu().numpy(), clamped.cpu().numpy())


def answers(a: PatchMap, b: PatchMap, matches: Matches, points: Points) -> Points:
    """Return the positions in B of A's points: the center of the match of the patch that holds each point. [P, 2]

    Source: Junyi42/sd-dino@48278d9 pck_spair_pascal.py: the nearest patch, without interpolation.
    """
    return b.centers[matches.forth[a.holding(points)]]


def pck(a: PatchMap, b: PatchMap, matches: Matches, at_a: Points, at_b: Points, side_of: SideOf = "box") -> list[Pck]:
    """Score the predicted positions of A's keypoints against their true ones in B, for each of `ALPHAS`.

    Args:
        a: Patches of photo A.
        b: Patches of photo B.
        matches: Matches between A and B.
        at_a: Keypoints in A. [P, 2]
        at_b: Corresponding keypoints in B. [P, 2]
        side_of: Reference length for `alpha`: the box of the keypoints, or the photo.
    """
    scaled = at_a * (np.array(b.size[::-1]) / np.array(a.size[::-1]))
    distances = [_measure_distances(answer, at_b) for answer in (answers(a, b, matches, at_a), scaled)]
    all_distances = np.linalg.norm(b.centers[None] - at_b[:, None], axis=2)  # [P, hB*wB]
    thresholds = {alpha: near_enough(b, at_b, side_of, alpha) for alpha in ALPHAS}
    return [
        Pck(alpha, *(100 * float((d <= thresholds[alpha]).mean()) for d in (*distances, all_distances)))
        for alpha in ALPHAS
    ]


def near_enough(b: PatchMap, at_b: Points, side_of: SideOf, alpha: float) -> float:
    """Return the largest distance between a correct prediction and the true position, in pixels of B."""
    return alpha * float(max(np.ptp(at_b, axis=0)) if side_of == "box" else max(b.size))


def mean_pck(pairs: Sequence[Sequence[Pck]]) -> list[Pck]:
    """Average scores over pairs of photos, with equal weights."""
    mean = np.mean([[(s.found, s.same_place, s.chance) for s in scores] for scores in pairs], axis=0)
    return [Pck(score.alpha, *row) for score, row in zip(pairs[0], mean.tolist(), strict=True)]


def _measure_distances(a: Points, b: Points) -> NDArray[np.float64]:
    return np.linalg.norm(a - b, axis=1)


def spread_out(a: PatchMap, chosen: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Divide photo A into about `count` cells, and select the best patch in each.

    Args:
        a: Patches of photo A.
        chosen: Numbers of patches, the best first.
        count: Number of cells, which are as square as possible.
    """
    (rows, columns), (height, width) = a.grid, a.size
    down = min(rows, max(1, round((count * height / width) ** 0.5)))
    across = min(columns, max(1, round(count / down)))
    part = (chosen // columns * down // rows) * across + chosen % columns * across // columns
    return chosen[np.sort(np.unique(part, return_index=True)[1])]
