"""Colors: patch tokens of many photos as red, green and blue, from one joint PCA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dinocli.apps.segment.foreground import KEEP, TAU, By, foreground
from dinocli.core.errors import DinoError
from dinocli.data.decode.pixels import BadImage, Pixels
from dinocli.data.sources.photos import read_photo
from dinocli.features.encoder import Encoder, NotFinite

PHOTOS, PATCHES = (1000, 65_536)  # limits of the PCA's sample: 65,536 tokens of 1,536 numbers take 0.4 GB
_REACH = 2.0  # standard deviations from the mean to either end of a color channel


@dataclass(frozen=True)
class Colors:
    """Shared mapping from patch tokens to colors.

    Attributes:
        mean: Mean of all sampled patches. [D]
        first: First principal component of all sampled patches, oriented towards the foreground. [D]
        least: Projection on `first` above which a patch is foreground. If None, every patch is foreground.
        middle: Mean of the foreground patches. [D]
        axes: First three components of the foreground patches, scaled so that two standard deviations have length 1.
            [D, 3]
        skipped: Unreadable photos of the sample, with reasons.
    """

    mean: Tensor
    first: Tensor
    least: float | None
    middle: Tensor
    axes: Tensor
    skipped: dict[Path, str]

    def paint(self, tokens: Tensor, height: int, width: int) -> Pixels:
        """Paint patches at the given size, with a black background. [rows, columns, D] -> [height, width, 3]"""
        tokens = tokens.cpu().double()
        planes = torch.cat([(tokens - self.middle) @ self.axes, ((tokens - self.mean) @ self.first)[..., None]], dim=-1)
        large = F.interpolate(planes.permute(2, 0, 1)[None], (height, width), mode="bilinear", align_corners=False)[0]
        rgb = large[:3].clamp(-1, 1) * 127.5 + 127.5
        if self.least is not None:
            rgb = rgb * (large[3] > self.least)
        return rgb.round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()


def fit_colors(
    encoder: Encoder,
    photos: Sequence[Path],
    short_side: int,
    by: By,
    *,
    keep: float = KEEP,
    tau: float = TAU,
    seed: int = 0,
    report: Callable[[int], None] = lambda done: None,
) -> Colors:
    """Fit colors on at most 65,536 patches of 1,000 photos, drawn at random.

    A first PCA over all patches separates foreground from background. A second PCA over the foreground patches gives
    the colors. The foreground by another method orients the first component. The threshold is halfway between the
    mean projections of foreground and other patches. If no photo has a foreground, all patches are used.

    Args:
        encoder: Frozen encoder.
        photos: Photo files; unreadable ones are skipped.
        short_side: Short side in pixels after resizing.
        by: Method that finds the foreground.
        keep: Share of the attention that the foreground holds.
        tau: Cosine threshold of the cut.
        seed: Seed of the sampled patches.
        report: Callback after each photo, with the number done.

    Raises:
        DinoError: If no photo can be read, or there are fewer than four patches.

    Source: the figures of DINOv2, arXiv 2304.07193, section 7.5, whose threshold is set by hand.
    """
    random, skipped = np.random.default_rng(seed), dict[Path, str]()
    chosen = random.permutation(len(photos))[:PHOTOS]
    per_photo = max(1, PATCHES // max(1, len(chosen)))
    tokens, inside = list[Tensor](), list[Tensor]()
    for done, i in enumerate(chosen.tolist(), 1):
        pixels = read_photo(photos[i], encoder.images)
        if isinstance(pixels, BadImage):
            skipped[photos[i]] = pixels.reason
        else:
            try:
                grid = encoder.patches(encoder.photo(pixels, short_side))[0]  # [rows, columns, D]
                mask = torch.from_numpy(foreground(encoder, pixels, short_side, by, keep=keep, tau=tau).mask)
            except NotFinite as error:
                skipped[photos[i]] = error.reason
            else:
                is_foreground = F.interpolate(mask[None, None].float(), grid.shape[:2])[0, 0] > 0.5  # [rows, columns]
                rows = torch.from_numpy(random.permutation(is_foreground.numel())[:per_photo])
                tokens.append(grid.flatten(0, 1).cpu()[rows])
                inside.append(is_foreground.flatten()[rows])
        report(done)
    if not tokens:
        path, reason = next(iter(skipped.items()))
        raise DinoError(f"none of the images can be read; {path}: {reason}", "name a photo such as a .jpg")
    return _fit_axes(torch.cat(tokens).double(), torch.cat(inside), skipped)


def _fit_axes(tokens: Tensor, inside: Tensor, skipped: dict[Path, str]) -> Colors:
    """Fit colors to sampled tokens [S, D] and their foreground mask [S]."""
    if len(tokens) < 4:
        raise DinoError(f"a PCA needs at least four patches; got {len(tokens)}", "use a larger --short-side")
    mean = tokens.mean(0)
    first, least = _components(tokens - mean, 1)[:, 0], None
    if inside.any() and not inside.all():
        inside_mean, outside_mean = (((tokens[side] - mean) @ first).mean() for side in (inside, ~inside))
        side = 1 if inside_mean >= outside_mean else -1
        first, least = side * first, float(side * (inside_mean + outside_mean) / 2)
    foreground_tokens = tokens if least is None else tokens[(tokens - mean) @ first > least]
    foreground_tokens = foreground_tokens if len(foreground_tokens) >= 4 else tokens
    middle = foreground_tokens.mean(0)
    axes = _components(foreground_tokens - middle, 3)
    spread = ((foreground_tokens - middle) @ axes).std(0)
    return Colors(mean, first, least, middle, axes / (_REACH * spread).clamp_min(1e-12), skipped)


def _components(centered: Tensor, count: int) -> Tensor:
    """Return the first principal components, with each one's largest coordinate positive. [S, D] -> [D, count]"""
    vectors = torch.linalg.eigh(centered.T @ centered).eigenvectors.flip(1)[:, :count]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * largest.sign()
