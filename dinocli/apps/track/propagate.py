"""Tracking: propagate the labels of a video's first frame by patch similarity."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dinocli.data.decode.pixels import Pixels
from dinocli.data.sources.label_maps import Labels
from dinocli.evals.units import normalized
from dinocli.features.encoder import Encoder
from dinocli.models.backbone import Facet

SHORT_SIDE = 480  # pixels
_TILE = 16  # rows and columns of a tile of query patches


@dataclass(frozen=True)
class Rule:
    """Rule of label propagation, with the original's defaults.

    Attributes:
        previous: Number of preceding frames to use, in addition to the first frame.
        radius: Largest distance of a source patch in rows, and in columns.
        top: Number of most similar source patches per patch.
        temperature: Temperature of the weights, exp(cosine / temperature).
    """

    previous: int = 7
    radius: int = 12
    top: int = 5
    temperature: float = 0.1


@dataclass(frozen=True)
class Looking:
    """Settings of a frame's patch features.

    Attributes:
        short_side: Short side in pixels after resizing.
        layer: Number of the block.
        facet: Tensor of the block to use.
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
    """Propagate the labels of a first frame through the following frames.

    Only the patches of the first and of the last few frames stay in memory.

    Args:
        encoder: Frozen network whose patches are compared between frames.
        first: Pixels of the first frame. [H, W, C]
        labels: Object number of each of its pixels, 0 for none. [H, W]
        frames: Following frames in order, all of the same size. [H, W, C] each
        rule: Rule of label propagation.
        looking: Settings of the patch features.

    Yields:
        Object number of each pixel, per frame. [H, W]

    Source: facebookresearch/dino@7c446df eval_video_segmentation.py, with three differences. Frames are normalized by
    the training's own statistics (the original has .228 for .229). Sides are rounded to patches, not to 64 pixels.
    Patches are enlarged to the frame's size directly, not to the network's size and then by repetition.
    """
    values = np.unique(np.append(labels, np.uint8(0)))
    start = _patches(encoder, first, looking)
    start_labels = one_hot(labels, values, (start.shape[0], start.shape[1])).to(start)
    previous: deque[tuple[Tensor, Tensor]] = deque(maxlen=rule.previous)
    for frame in frames:
        patches = _patches(encoder, frame, looking)
        sources, source_labels = zip((start, start_labels), *previous, strict=True)
        shares = propagate(patches, torch.stack(sources), torch.stack(source_labels), rule)
        previous.append((patches, shares))
        yield values[decide(shares, frame.shape[:2]).cpu().numpy()]


def _patches(encoder: Encoder, frame: Pixels, looking: Looking) -> Tensor:
    image = encoder.photo(frame, looking.short_side)
    return normalized(encoder.patches(image, [looking.layer], looking.facet)[0])  # [h, w, D]


def one_hot(labels: Labels, values: Sequence[int] | Labels, grid: tuple[int, int]) -> Tensor:
    """Return a mask of each value at the patch centers. [values, h, w]"""
    rows, columns = ((np.arange(n) * 2 + 1) * side // (2 * n) for n, side in zip(grid, labels.shape, strict=True))
    small = labels[rows[:, None], columns]
    return torch.from_numpy(np.stack([small == value for value in values]))


def propagate(patches: Tensor, sources: Tensor, labels: Tensor, rule: Rule) -> Tensor:
    """Compute the labels of a frame's patches: the weighted mean over the most similar nearby patches of other frames.

    Patches are processed in tiles, which bounds the memory of the similarities.

    Args:
        patches: Normalized patches of the frame. [h, w, D]
        sources: Normalized patches of other frames. [S, h, w, D]
        labels: Share of each label in each source patch. [S, L, h, w]
        rule: Rule of label propagation; patches as similar as the last of the `top` are included.

    Returns:
        Shares of the labels. [L, h, w]
    """
    height, width, _ = patches.shape
    shares_of_frame = torch.empty((labels.shape[1], height, width), dtype=patches.dtype, device=patches.device)
    row_numbers, column_numbers = (torch.arange(n, device=patches.device) for n in (height, width))
    for top in range(0, height, _TILE):
        for left in range(0, width, _TILE):
            here = slice(top, top + _TILE), slice(left, left + _TILE)
            there = _widen(here[0], rule.radius), _widen(here[1], rule.radius)
            near_rows = (row_numbers[here[0], None] - row_numbers[None, there[0]]).abs() <= rule.radius  # [t, T]
            near_columns = (column_numbers[here[1], None] - column_numbers[None, there[1]]).abs() <= rule.radius
            is_near = near_rows[:, None, :, None] & near_columns[None, :, None, :]  # [t, t, T, T]
            candidates = sources[:, there[0], there[1]]  # [S, T, T, D]
            tile = patches[here]  # [t, t, D]
            similar = tile.flatten(0, 1) @ candidates.flatten(0, 2).T  # [t*t, S*T*T]
            is_far = ~is_near.flatten(2).flatten(0, 1).repeat(1, len(sources))
            candidate_labels = labels[:, :, there[0], there[1]].transpose(0, 1).flatten(1)  # [L, S*T*T]
            shares = _average_labels(similar.masked_fill_(is_far, -torch.inf), candidate_labels, rule)
            shares_of_frame[:, here[0], here[1]] = shares.unflatten(1, tile.shape[:2])
    return shares_of_frame


def _widen(tile: slice, radius: int) -> slice:
    return slice(max(0, tile.start - radius), tile.stop + radius)


def _average_labels(similar: Tensor, labels: Tensor, rule: Rule) -> Tensor:
    """Return the means of labels, weighted by similarity over the most similar. [Q, N] and [L, N] -> [L, Q]"""
    top = similar.topk(min(rule.top, similar.shape[1]), dim=1).values
    query, source = (similar >= top[:, -1:]).nonzero(as_tuple=True)
    # Weights are relative to the most similar patch, so that a low temperature does not overflow.
    weights = ((similar[query, source] - top[query, 0]) / rule.temperature).exp()
    total = torch.zeros_like(top[:, 0]).index_add_(0, query, weights)
    sums = labels.new_zeros(len(labels), len(similar)).index_add_(1, query, labels[:, source] * weights)
    return sums / total


def decide(shares: Tensor, size: tuple[int, int]) -> Tensor:
    """Choose the label with the largest share per pixel, after enlarging and stretching each label's shares to 0 to 1.

    Stretching lets a small object compete with the background if no patch contains it alone.

    Args:
        shares: Shares of the labels. [L, h, w]
        size: Height and width of the frame.

    Returns:
        Number of the label. [H, W]
    """
    large = F.interpolate(shares[None], size=size, mode="bilinear", align_corners=False)[0]
    low, high = large.amin((1, 2), keepdim=True), large.amax((1, 2), keepdim=True)
    return torch.where(high > 0, (large - low) / (high - low).where(high > low, 1), large).argmax(0)
