"""Matching on disk: two photos to matched places, a picture of them, and a score."""

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

from dinocli.atomic import atomic
from dinocli.data.decode import Pixels
from dinocli.diffusion import DIMS, LONG_SIDE, Diffusion
from dinocli.encoder import Encoder, checked
from dinocli.evals.attention import default_size
from dinocli.evals.match import Matches, PatchMap, Points, answers, joint_pca
from dinocli.evals.units import normalized
from dinocli.models.backbone import Facet
from dinocli.picture import Panel, sheet, visible

_HEIGHT = 400  # pixels, of both photos in the picture
_GAP = 8  # pixels between them
_MOST = 60  # keypoints drawn
_RIGHT, _WRONG = (60, 190, 90), (225, 60, 60)


@dataclass(frozen=True)
class Compared:
    """What of a photo is compared.

    Attributes:
        layers: Numbers of the blocks, whose patches are joined.
        facet: What of them.
        short_side: What to resize the photo's short side to, in pixels; absent, what fits the encoder.
        pca: To how many numbers a patch's features are brought, of both photos together; absent, as they are.
        diffusion: A Stable Diffusion model whose features are joined to them, if any.
        weight: Of the diffusion model's features, 0 to 1; the others have the rest.
        long_side: What to resize the photo's long side to for it, in pixels.
    """

    layers: tuple[int, ...] = (-1,)
    facet: Facet = "token"
    short_side: int | None = None
    pca: int | None = None
    diffusion: Diffusion | None = None
    weight: float = 0.5
    long_side: int = LONG_SIDE


def patch_maps(encoder: Encoder, a: Pixels, b: Pixels, compared: Compared) -> tuple[PatchMap, PatchMap]:
    """Two photos as patches that can be compared.

    Args:
        encoder: Its patches are compared.
        a: [H, W, C]
        b: [H, W, C], of any other size.
        compared: What of them.

    Source: Zhang et al., arXiv 2305.15347, section 3.3: each kind normalized, weighed and joined.
    """
    size = compared.short_side or default_size(encoder)
    images = (encoder.photo(photo, size) for photo in (a, b))
    ours, theirs = (encoder.patches(image, compared.layers, compared.facet)[0] for image in images)  # [h, w, D]
    if compared.pca:
        ours, theirs = joint_pca(ours, theirs, compared.pca)
    if compared.diffusion:
        more = diffusion_maps(compared.diffusion, (a, b), (ours, theirs), compared.long_side)
        both = zip((ours, theirs), more, strict=True)
        ours, theirs = (_joined(made, diffused, compared.weight) for made, diffused in both)
    return PatchMap(normalized(ours), a.shape[:2]), PatchMap(normalized(theirs), b.shape[:2])


def _joined(ours: Tensor, diffused: Tensor, weight: float) -> Tensor:
    return torch.cat([(1 - weight) * normalized(ours), weight * normalized(diffused)], -1)


def diffusion_maps(
    diffusion: Diffusion, photos: tuple[Pixels, Pixels], like: tuple[Tensor, Tensor], long_side: int
) -> tuple[Tensor, Tensor]:
    """A diffusion model's features of two photos, each layer by joint PCA, on grids such as `like` has. [h, w, D']"""
    layers = zip(*(diffusion.layers(visible(photo), long_side) for photo in photos), strict=True)
    made = [joint_pca(checked(a, "values of layers"), checked(b, "values of layers"), DIMS) for a, b in layers]
    a, b = (torch.cat([_resized(pair[i], like[i].shape[:2]) for pair in made], -1).to(like[i].device) for i in (0, 1))
    return a, b


def _resized(features: Tensor, grid: torch.Size) -> Tensor:
    """[h, w, D] of any rows and columns."""
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
    """Write lines between matched places, each photo drawn with the pixels of the other, and keypoints if any.

    Args:
        path: The PNG.
        photos: Both, of any sizes.
        maps: Both as patches.
        matches: Of them.
        lines: Patches of A from which to draw a line.
        keypoints: Of A, of B, and how many pixels of B are near enough.
    """
    a, b = maps
    seen = (visible(photos[0]), visible(photos[1]))
    at_a, at_b = a.centers[lines], b.centers[matches.forth[lines]]
    across = at_a[:, 0].argsort().argsort() / max(1, len(at_a) - 1)
    colors = [(int(255 * r), int(255 * g), int(255 * b)) for r, g, b, _ in colormaps["turbo"](0.05 + 0.9 * across)]
    rows = [
        Panel(_lines(seen, at_a, at_b, colors), f"{len(matches.mutual)} mutual nearest patches, {len(lines)} drawn")
    ]
    swapped = swap(seen[1], a, b, matches.forth), swap(seen[0], b, a, matches.back)
    rows.append(Panel(_beside(swapped, seen), "each patch as its match in the other photo looks"))
    if keypoints:
        true_a, true_b, near = keypoints
        found = answers(a, b, matches, true_a)
        right = np.linalg.norm(found - true_b, axis=1) <= near
        some = np.unique(np.linspace(0, len(right) - 1, min(len(right), _MOST)).round().astype(int))
        marks = [_RIGHT if hit else _WRONG for hit in right[some]]
        caption = f"{right.sum()} of {len(right)} keypoints are near enough"
        rows.append(Panel(_lines(seen, true_a[some], found[some], marks), caption))
    with atomic(path) as draft:
        sheet([[row] for row in rows]).save(draft, format="PNG", optimize=True)


def swap(other: Pixels, a: PatchMap, b: PatchMap, forth: NDArray[np.int64]) -> Pixels:
    """Photo A with each patch drawn as the patch of B that it is matched with. [hA*s, wA*s, 3]

    Args:
        other: Photo B. [H, W, 3]
        a: A as patches.
        b: B as patches.
        forth: Number of the patch of B, for each of A.
    """
    (rows, columns), (height, width) = b.grid, a.grid
    side = max(1, -(-_HEIGHT // height))  # pixels of a patch
    large = np.asarray(Image.fromarray(other).resize((columns * side, rows * side), Image.Resampling.LANCZOS))
    tiles = large.reshape(rows, side, columns, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
    return tiles[forth].reshape(height, width, side, side, 3).swapaxes(1, 2).reshape(height * side, width * side, 3)


def _at_height(picture: Pixels, photo: Pixels) -> Pixels:
    """A picture in the shape of a photo, at the height that all have."""
    width = max(1, round(_HEIGHT * photo.shape[1] / photo.shape[0]))
    return np.asarray(Image.fromarray(picture).resize((width, _HEIGHT), Image.Resampling.LANCZOS))


def _beside(pictures: tuple[Pixels, Pixels], photos: tuple[Pixels, Pixels]) -> Pixels:
    """Two pictures in the shapes of two photos, with paper between them. [H, W, 3]"""
    left, right = (_at_height(picture, photo) for picture, photo in zip(pictures, photos, strict=True))
    return np.concatenate([left, np.full((_HEIGHT, _GAP, 3), 255, np.uint8), right], axis=1)


def _lines(photos: tuple[Pixels, Pixels], at_a: Points, at_b: Points, colors: list[tuple[int, int, int]]) -> Pixels:
    """Two photos beside each other, with lines from places of the one to places of the other."""
    large = 3  # times, so that lines come out smooth
    page = Image.fromarray(_beside(photos, photos))
    size = page.size
    page = page.resize((size[0] * large, size[1] * large), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(page)
    scales = [large * _HEIGHT / photo.shape[0] for photo in photos]
    begin = large * (_at_height(photos[0], photos[0]).shape[1] + _GAP)
    ends = zip((at_a * scales[0]).tolist(), (at_b * scales[1] + [begin, 0]).tolist(), colors, strict=True)
    for (xa, ya), (xb, yb), color in ends:
        pen.line((xa, ya, xb, yb), color, width=2 * large - 1)
        for x, y in ((xa, ya), (xb, yb)):
            pen.circle((x, y), 4 * large, color, outline=(255, 255, 255), width=large)
    return np.asarray(page.resize(size, Image.Resampling.LANCZOS))
