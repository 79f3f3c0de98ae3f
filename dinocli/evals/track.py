"""Tracking: labels of a video's first frame, carried on from frame to frame by what their patches look like."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dinocli.data.decode import Pixels
from dinocli.data.labels import Labels
from dinocli.encoder import Encoder
from dinocli.evals.units import normalized
from dinocli.models.backbone import Facet

SHORT_SIDE = 480  # pixels
_TILE = 16  # patches on a side, asked at once


@dataclass(frozen=True)
class Rule:
    """How a patch comes by its label. The numbers are the original's.

    Attributes:
        previous: Frames before this one that are asked, beside the first.
        radius: How far from the patch, in rows and in columns, a patch of them may lie.
        top: How many of those most like it are asked.
        temperature: They weigh exp(cosine / temperature).
    """

    previous: int = 7
    radius: int = 12
    top: int = 5
    temperature: float = 0.1


@dataclass(frozen=True)
class Looking:
    """How a frame becomes patches.

    Attributes:
        short_side: What to resize its short side to, in pixels.
        layer: Number of the block.
        facet: What of it.
    """

    short_side: int = SHORT_SIDE
    layer: int = -1
    facet: Facet = "token"


def track(
    encoder: Encoder,
    first: Pixels,
    labels: Labels,
    frames: Iterable[Pixels],
    rule: Rule = Rule(),
    looking: Looking = Looking(),
) -> Iterator[Labels]:
    """Carry the labels of a first frame through the frames after it.

    What is held is the patches of the first frame and of the last few, and nothing of the others.

    Args:
        encoder: Its patches are compared.
        first: [H, W, C]
        labels: Which object each pixel of it belongs to, 0 for none. [H, W]
        frames: All of the first one's size, in order. [H, W, C] each
        rule: How a patch comes by its label.
        looking: How a frame becomes patches.

    Yields:
        For each frame, which object each pixel belongs to. [H, W]

    Source: facebookresearch/dino@7c446df eval_video_segmentation.py, but that frames are normalized by the training's
    own statistics (the original has .228 for .229), sides are rounded to patches and not to 64 pixels, and patches
    are enlarged to the frame's size at once, and not to the network's and from there by repetition.
    """
    values = np.unique(np.append(labels, np.uint8(0)))
    start = _patches(encoder, first, looking)
    at_start = one_hot(labels, values, (start.shape[0], start.shape[1])).to(start)
    before: deque[tuple[Tensor, Tensor]] = deque(maxlen=rule.previous)
    for frame in frames:
        patches = _patches(encoder, frame, looking)
        sources, theirs = zip((start, at_start), *before, strict=True)
        shares = propagate(patches, torch.stack(sources), torch.stack(theirs), rule)
        before.append((patches, shares))
        yield values[decide(shares, frame.shape[:2]).cpu().numpy()]


def _patches(encoder: Encoder, frame: Pixels, looking: Looking) -> Tensor:
    image = encoder.photo(frame, looking.short_side)
    return normalized(encoder.patches(image, [looking.layer], looking.facet)[0])  # [h, w, D]


def one_hot(labels: Labels, values: Sequence[int] | Labels, grid: tuple[int, int]) -> Tensor:
    """Which value stands in the middle of each patch. [values, h, w]"""
    rows, columns = ((np.arange(n) * 2 + 1) * side // (2 * n) for n, side in zip(grid, labels.shape, strict=True))
    small = labels[rows[:, None], columns]
    return torch.from_numpy(np.stack([small == value for value in values]))


def propagate(patches: Tensor, sources: Tensor, labels: Tensor, rule: Rule) -> Tensor:
    """Labels of a frame's patches: the weighted mean of the labels of those patches of other frames most like them.

    Patches are asked a tile at a time, which keeps the similarities small.

    Args:
        patches: Of the frame, normalized. [h, w, D]
        sources: Of other frames, normalized. [S, h, w, D]
        labels: Share of each label in each patch of them. [S, L, h, w]
        rule: How a patch comes by its label; patches as like as the last of the `top` count too.

    Returns:
        Shares of the labels. [L, h, w]
    """
    height, width, _ = patches.shape
    made = torch.empty((labels.shape[1], height, width), dtype=patches.dtype, device=patches.device)
    row, column = (torch.arange(n, device=patches.device) for n in (height, width))
    for top in range(0, height, _TILE):
        for left in range(0, width, _TILE):
            here = slice(top, top + _TILE), slice(left, left + _TILE)
            there = _around(here[0], rule.radius), _around(here[1], rule.radius)
            near_rows = (row[here[0], None] - row[None, there[0]]).abs() <= rule.radius  # [t, T]
            near_columns = (column[here[1], None] - column[None, there[1]]).abs() <= rule.radius
            near = near_rows[:, None, :, None] & near_columns[None, :, None, :]  # [t, t, T, T]
            asked = sources[:, there[0], there[1]]  # [S, T, T, D]
            tile = patches[here]  # [t, t, D]
            similar = tile.flatten(0, 1) @ asked.flatten(0, 2).T  # [t*t, S*T*T]
            far = ~near.flatten(2).flatten(0, 1).repeat(1, len(sources))
            theirs = labels[:, :, there[0], there[1]].transpose(0, 1).flatten(1)  # [L, S*T*T]
            shares = _weighed(similar.masked_fill_(far, -torch.inf), theirs, rule)
            made[:, here[0], here[1]] = shares.unflatten(1, tile.shape[:2])
    return made


def _around(tile: slice, radius: int) -> slice:
    return slice(max(0, tile.start - radius), tile.stop + radius)


def _weighed(similar: Tensor, labels: Tensor, rule: Rule) -> Tensor:
    """Means of labels, weighed by the similarity of those most similar. [L, Q] of [Q, N] and [L, N]"""
    top = similar.topk(min(rule.top, similar.shape[1]), dim=1).values
    asking, asked = (similar >= top[:, -1:]).nonzero(as_tuple=True)
    # Relative to the most similar, so that a low temperature does not overflow.
    weights = ((similar[asking, asked] - top[asking, 0]) / rule.temperature).exp()
    total = torch.zeros_like(top[:, 0]).index_add_(0, asking, weights)
    sums = labels.new_zeros(len(labels), len(similar)).index_add_(1, asking, labels[:, asked] * weights)
    return sums / total


def decide(shares: Tensor, size: tuple[int, int]) -> Tensor:
    """The label of each pixel: shares enlarged bilinearly, each label's stretched from 0 to 1, the greatest taken.

    Stretching lets a small object, which no patch holds for itself alone, stand against the background.

    Args:
        shares: [L, h, w]
        size: Height and width of the frame.

    Returns:
        Number of the label. [H, W]
    """
    large = F.interpolate(shares[None], size=size, mode="bilinear", align_corners=False)[0]
    low, high = large.amin((1, 2), keepdim=True), large.amax((1, 2), keepdim=True)
    return torch.where(high > 0, (large - low) / (high - low).where(high > low, 1), large).argmax(0)
