"""Matching pictures: patch features of two photos, and drawings of their matches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from dinocli.apps.match.correspond import Matches, PatchMap, Points, answers, joint_pca
from dinocli.apps.match.diffusion import DIMS, LONG_SIDE, Diffusion
from dinocli.core.atomic import atomic
from dinocli.data.decode.pixels import Pixels
from dinocli.evals.attention import default_size
from dinocli.evals.units import normalized
from dinocli.features.encoder import Encoder, checked
from dinocli.models.backbone import Facet
from dinocli.viz.picture import Tile, sheet, visible

_HEIGHT = 400  # pixels, for both photos in the picture
_GAP = 8  # pixels between them
_MOST = 60  # keypoints drawn at most
_RIGHT, _WRONG = (60, 190, 90), (225, 60, 60)


@dataclass(frozen=True)
class Compared:
    """Settings of the patch features to compare.

    Attributes:
        layers: Numbers of the blocks whose patch features are concatenated.
        facet: Tensor of the blocks to use.
        short_side: Short side in pixels after resizing. If None, `default_size` of the encoder.
        pca: Dimension after PCA over both photos. If None, no PCA.
        diffusion: Stable Diffusion model whose features are concatenated, or None.
        weight: Weight of the diffusion model's features, 0 to 1; the others get the rest.
        long_side: Long side in pixels after resizing, for the diffusion model.
    """

    layers: tuple[int, ...] = (-1,)
    facet: Facet = "token"
    short_side: int | None = None
    pca: int | None = None
    diffusion: Diffusion | None = None
    weight: float = 0.5
    long_side: int = LONG_SIDE


def patch_maps(encoder: Encoder, a: Pixels, b: Pixels, compared: Compared) -> tuple[PatchMap, PatchMap]:
    """Compute comparable patch features of two photos.

    Args:
        encoder: Frozen network whose patches are compared.
        a: Pixels of photo A. [H, W, C]
        b: Pixels of photo B, of any size. [H, W, C]
        compared: Settings of the features.

    Source: Zhang et al., arXiv 2305.15347, section 3.3: each kind is normalized, weighted and concatenated.
    """
    size = compared.short_side or default_size(encoder)
    images = (encoder.photo(photo, size) for photo in (a, b))
    ours, theirs = (encoder.patches(image, compared.layers, compared.facet)[0] for image in images)  # [h, w, D]
    if compared.pca:
        ours, theirs = joint_pca(ours, theirs, compared.pca)
    if compared.diffusion:
        diffused_maps = diffusion_maps(compared.diffusion, (a, b), (ours, theirs), compared.long_side)
        both = zip((ours, theirs), diffused_maps, strict=True)
        ours, theirs = (_join(own, diffused, compared.weight) for own, diffused in both)
    return PatchMap(normalized(ours), a.shape[:2]), PatchMap(normalized(theirs), b.shape[:2])


def _join(ours: Tensor, diffused: Tensor, weight: float) -> Tensor:
    return torch.cat([(1 - weight) * normalized(ours), weight * normalized(diffused)], -1)


def diffusion_maps(
    diffusion: Diffusion, photos: tuple[Pixels, Pixels], like: tuple[Tensor, Tensor], long_side: int
) -> tuple[Tensor, Tensor]:
    """Compute a diffusion model's features of two photos, by joint PCA per layer, on the grids of `like`. [h, w, D']"""
    layers = zip(*(diffusion.layers(visible(photo), long_side) for photo in photos), strict=True)
    reduced = [joint_pca(checked(a, "values of layers"), checked(b, "values of layers"), DIMS) for a, b in layers]
    a, b = (torch.cat([_resize(pair[i], like[i].shape[:2]) for pair in reduced], -1).to(like[i].device) for i in (0, 1))
    return a, b


def _resize(features: Tensor, grid: torch.Size) -> Tensor:
    """Resize features to a grid. [h, w, D]"""
    large = F.interpolate(features.permute(2, 0, 1)[None], size=tuple(grid), mode="bilinear", align_corners=False)
    return large[0].permute(1, 2, 0)


def write_picture(
    path: Path,
    photos: tuple[Pixels, Pixels],
    maps: tuple[PatchMap, PatchMap],
    matches: Matches,
    lines: NDArray[np.int64],
    keypoints: tuple[Points, Points, float] | None,
) -> None:
    """Write a picture with lines between matches, each photo redrawn from the other's patches, and the keypoints.

    Args:
        path: Path of the PNG.
        photos: Pixels of both photos, of any size.
        maps: Patch features of both photos.
        matches: Matches between the photos.
        lines: Patches of A with a line to their match.
        keypoints: Keypoints of A and of B, and the largest distance of a correct match in pixels of B; or None.
    """
    a, b = maps
    colors_of_photos = (visible(photos[0]), visible(photos[1]))
    at_a, at_b = a.centers[lines], b.centers[matches.forth[lines]]
    across = at_a[:, 0].argsort().argsort() / max(1, len(at_a) - 1)
    colors = [(int(255 * r), int(255 * g), int(255 * b)) for r, g, b, _ in colormaps["turbo"](0.05 + 0.9 * across)]
    rows = [
        Tile(
            _draw_lines(colors_of_photos, at_a, at_b, colors),
            f"{len(matches.mutual)} mutual nearest patches, {len(lines)} drawn",
        )
    ]
    swapped = swap(colors_of_photos[1], a, b, matches.forth), swap(colors_of_photos[0], b, a, matches.back)
    rows.append(Tile(_place_beside(swapped, colors_of_photos), "each patch replaced by its match in the other photo"))
    if keypoints:
        true_a, true_b, near = keypoints
        predicted = answers(a, b, matches, true_a)
        right = np.linalg.norm(predicted - true_b, axis=1) <= near
        drawn = np.unique(np.linspace(0, len(right) - 1, min(len(right), _MOST)).round().astype(int))
        marks = [_RIGHT if hit else _WRONG for hit in right[drawn]]
        caption = f"{right.sum()} of {len(right)} keypoints within the threshold"
        rows.append(Tile(_draw_lines(colors_of_photos, true_a[drawn], predicted[drawn], marks), caption))
    with atomic(path) as draft:
        sheet([[row] for row in rows]).save(draft, format="PNG", optimize=True)


def swap(other: Pixels, a: PatchMap, b: PatchMap, forth: NDArray[np.int64]) -> Pixels:
    """Draw photo A with each patch replaced by its match in B. [hA*s, wA*s, 3]

    Args:
        other: Pixels of photo B. [H, W, 3]
        a: Patch features of A.
        b: Patch features of B.
        forth: Number of the matching patch of B, for each patch of A.
    """
    (rows, columns), (height, width) = b.grid, a.grid
    side = max(1, -(-_HEIGHT // height))  # pixels per patch
    large = np.asarray(Image.fromarray(other).resize((columns * side, rows * side), Image.Resampling.LANCZOS))
    tiles = large.reshape(rows, side, columns, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
    return tiles[forth].reshape(height, width, side, side, 3).swapaxes(1, 2).reshape(height * side, width * side, 3)


def _resize_to_height(picture: Pixels, photo: Pixels) -> Pixels:
    """Resize a picture to the common height, with the aspect ratio of a photo."""
    width = max(1, round(_HEIGHT * photo.shape[1] / photo.shape[0]))
    return np.asarray(Image.fromarray(picture).resize((width, _HEIGHT), Image.Resampling.LANCZOS))


def _place_beside(pictures: tuple[Pixels, Pixels], photos: tuple[Pixels, Pixels]) -> Pixels:
    """Place two pictures side by side, with the aspect ratios of two photos. [H, W, 3]"""
    left, right = (_resize_to_height(picture, photo) for picture, photo in zip(pictures, photos, strict=True))
    return np.concatenate([left, np.full((_HEIGHT, _GAP, 3), 255, np.uint8), right], axis=1)


def _draw_lines(
    photos: tuple[Pixels, Pixels], at_a: Points, at_b: Points, colors: list[tuple[int, int, int]]
) -> Pixels:
    """Draw two photos side by side, with lines between points of both."""
    scale_up = 3  # supersampling, for smooth lines
    page = Image.fromarray(_place_beside(photos, photos))
    size = page.size
    page = page.resize((size[0] * scale_up, size[1] * scale_up), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(page)
    scales = [scale_up * _HEIGHT / photo.shape[0] for photo in photos]
    left_of_b = scale_up * (_resize_to_height(photos[0], photos[0]).shape[1] + _GAP)
    ends = zip((at_a * scales[0]).tolist(), (at_b * scales[1] + [left_of_b, 0]).tolist(), colors, strict=True)
    for (xa, ya), (xb, yb), color in ends:
        pen.line((xa, ya, xb, yb), color, width=2 * scale_up - 1)
        for x, y in ((xa, ya), (xb, yb)):
            pen.circle((x, y), 4 * scale_up, color, outline=(255, 255, 255), width=scale_up)
    return np.asarray(page.resize(size, Image.Resampling.LANCZOS))
