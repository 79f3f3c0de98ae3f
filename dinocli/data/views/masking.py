"""Masking of the student's global crops, in blocks and with an exact number of masked patches."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, PositiveInt, field_validator
from torch import Tensor

from dinocli.core.config import Config

Grid = tuple[int, int]  # rows and columns of a crop's patches
Where = NDArray[np.bool_]

# Images per group over which mask ratios are spread, if a process's batch is a multiple of it. Then masks do not depend
# on the number of processes. The paper's ratios have a mean of 0.306 in a group; in an infinite one it would be 0.3.
_DEALT_TO = 32
_TRIES = 32  # blocks drawn per crop: twelve are enough for 99 % of 14 by 14 patches, sixteen for 98 % of 32 by 32
# No view has this number, so that dealing shares no random numbers with the blocks of a crop.
_DEALT = 2**31


class MaskConfig(Config):
    """Masking of the global crops. The paper masks half of the crops, with 0.1 to 0.5 of their patches.

    The ratios of masked crops are not drawn independently. Over 32 images at a time, they take equal steps between the
    two of `ratio`, the highest included. So batches of one size mask the same number of patches, and shapes stay fixed.
    iBOT masks nothing in half of the crops, and a ratio drawn in 0.3 +- 0.2 in the others. This equals `share = 0.5`
    and `ratio = [0.1, 0.5]`, except that iBOT tosses a coin for each crop.
    Its Swin recipe masks only from epoch 50 on, which is not supported.

    Attributes:
        share: Share of masked crops among the global crops of a batch, rounded to a whole number of crops.
        ratio: Lowest and highest share of masked patches in a masked crop.
        smallest: Smallest number of patches in a block. A smaller rest is masked patch by patch.
        aspect: Lowest and highest ratio of height to width of a block, log-uniform.

    Source: BEiT (arXiv 2106.08254), algorithm 1; the spread over a batch and the exact count as in DINOv2 and DINOv3.
    """

    share: float = Field(ge=0, le=1)
    ratio: tuple[float, float]
    smallest: PositiveInt
    aspect: tuple[float, float]

    @field_validator("ratio")
    @classmethod
    def _is_a_range(cls, ratio: tuple[float, float]) -> tuple[float, float]:
        if not (0 <= ratio[0] <= ratio[1] <= 1 and ratio[1] > 0):
            raise ValueError("expected two fractions of the patches, the smaller first")
        return ratio

    @field_validator("aspect")
    @classmethod
    def _are_ratios(cls, aspect: tuple[float, float]) -> tuple[float, float]:
        if not 0 < aspect[0] <= aspect[1] < math.inf:
            raise ValueError("expected two ratios of height to width, the smaller first")
        return aspect


@dataclass(frozen=True)
class PatchMasks:
    """Masked patches of a batch's global crops, and the patches that heads read: the masked ones by default.

    Attributes:
        where: True for masked patches. [G, B, N], bool
        rows: Indices of the patches to read among all G*B*N, ascending. [M], int64
        weights: Weight of each of them. That of a masked patch is 1 / (masked patches of its crop) / (G*B): a weighted
            sum over the masked patches is the mean over all crops of the mean per crop. [M], float32
        counts: Patches to read per crop, on the host so that nothing waits for the device. [G, B], int64
    """

    where: Tensor
    rows: Tensor
    weights: Tensor
    counts: Tensor

    @classmethod
    def of(cls, where: Tensor) -> PatchMasks:
        """Compute rows and weights of masked patches, all on the host. [G, B, N], bool"""
        counts = where.sum(-1)
        weights = 1 / counts.clamp(min=1).double() / counts.numel()
        rows = where.flatten().nonzero()[:, 0]
        return cls(where, rows, weights.flatten().repeat_interleave(counts.flatten()).float(), counts)

    def with_visible(self, weight: float) -> PatchMasks:
        """Return the masks with the visible patches of masked crops among those to read.

        A weighted sum over them is the mean over all crops of (mean over masked + `weight` * mean over visible
        patches). The masks must be those of `of`, or a part of them.
        """
        patches, device = self.where.shape[-1], self.where.device
        masked = self.counts.flatten()
        crops = masked.nonzero()[:, 0]  # [C], on the host: the device is not waited for
        masked = masked[crops].double()
        each = torch.stack([1 / masked, weight / (patches - masked).clamp(min=1)], 1) / self.counts.numel()  # [C, 2]
        each = each.to(self.weights.dtype).to(device, non_blocking=True)
        there = crops.to(device, non_blocking=True)
        rows = (there[:, None] * patches + torch.arange(patches, device=device)).flatten()  # [C*N]
        weights = torch.where(self.where.flatten(0, 1)[there], each[:, :1], each[:, 1:]).flatten()
        return PatchMasks(self.where, rows, weights, patches * self.counts.sign())

    def split(self, count: int) -> list[PatchMasks]:
        """Split the masks into `count` parts of the images, in order.

        The mean loss of equal parts is the loss of the whole. Parts may differ in their number of masked patches: only
        the whole has a fixed number.
        """
        wheres, counts = self.where.chunk(count, 1), self.counts.chunk(count, 1)
        images, patches = self.where.shape[1:]
        ends = self.counts.flatten().cumsum(0).view_as(self.counts)
        begins = ends - self.counts
        parts, first = [], 0
        for where, each in zip(wheres, counts, strict=True):
            size = where.shape[1]
            spans = list(zip(begins[:, first].tolist(), ends[:, first + size - 1].tolist(), strict=True))
            # The crops of view g begin at g * images in the batch and at g * size in the part.
            moved = [(g * (images - size) + first) * patches for g in range(len(spans))]
            rows = [self.rows[begin:end] - by for (begin, end), by in zip(spans, moved, strict=True)]
            weights = [self.weights[begin:end] for begin, end in spans]
            parts.append(PatchMasks(where, torch.cat(rows), torch.cat(weights) * (images / size), each))
            first += size
        return parts


def masked_counts(config: MaskConfig, crops: int, patches: int) -> list[int]:
    """Return the number of masked patches for each masked crop of a group, fewest first.

    Crop i of n gets the upper edge of the i-th of n equal steps from the lowest share to the highest, and at least one
    patch.

    Args:
        config: Shares to deal.
        crops: Number of global crops in the group.
        patches: Number of patches per crop, N.
    """
    masked = round(config.share * crops)
    edges = np.linspace(*config.ratio, masked + 1)[1:]
    return [max(1, round(patches * edge)) for edge in edges.tolist()]


def _groups(images: int) -> int:
    """Return the number of groups of 32 in a process's images; 1 if they are no multiple of 32."""
    return images // _DEALT_TO if images % _DEALT_TO == 0 else 1


def masked_in_all(config: MaskConfig, crops: tuple[int, int], patches: int) -> int:
    """Return the number M of masked patches in a process's batch. `crops` and `patches` are those of `deal`."""
    count = _groups(crops[1])
    return count * sum(masked_counts(config, crops[0] * crops[1] // count, patches))


def deal(config: MaskConfig, crops: tuple[int, int], patches: int, *, seed: int, batch: int, rank: int) -> Tensor:
    """Return the number of masked patches per crop of a batch, shuffled; 0 for crops without a mask. [G, B], int64

    Every process masks the same number. Two processes with 32 images each get the counts of one with all 64.

    Args:
        config: Shares to deal.
        crops: G and B of this process.
        patches: Number of patches per crop, N.
        seed: Seed of the run, mixed with the number of the batch.
        batch: Number of the batch in the run.
        rank: Rank of the process with this batch.
    """
    views, images = crops
    count = _groups(images)
    counts = np.zeros(views * images // count, dtype=np.int64)
    masked = masked_counts(config, len(counts), patches)
    counts[: len(masked)] = masked
    dealt = [
        np.random.default_rng((seed, batch, group, _DEALT)).permutation(counts).reshape(views, -1)
        for group in range(rank * count, (rank + 1) * count)
    ]
    return torch.from_numpy(np.concatenate(dealt, axis=1))


def generator_of(seed: int, epoch: int, index: int, view: int) -> np.random.Generator:
    """Return the generator for the blocks of an image's view. It depends on nothing else and repeats no other draw."""
    # With a 0 at the end, it would repeat the numbers of the image's crops.
    return np.random.default_rng((seed, epoch, index, 1 + view))


def blocks(config: MaskConfig, grid: Grid, count: int, generator: np.random.Generator) -> Where:
    """Mask exactly `count` patches, in rectangles as far as possible. [rows, columns]

    The area of a rectangle is drawn between `smallest` and the number of patches left to mask, its position among all
    that fit. A rectangle that would mask too many patches is skipped. The rest is masked patch by patch.

    Args:
        config: Limits of the rectangles.
        grid: Rows and columns of patches.
        count: Number of patches to mask, at most all.
        generator: Random generator. Rectangles always take the same number of draws; single patches take more.
    """
    rows, columns = grid
    lowest, highest = (math.log(ratio) for ratio in config.aspect)
    # Patch i is bit i of an integer, so that adding and counting a rectangle takes a tenth of the time of arrays.
    every_row = sum(1 << columns * i for i in range(rows))
    masked, left = 0, count
    for size, form, down, right in generator.random((_TRIES, 4)).tolist():
        if left < config.smallest:
            break
        area = config.smallest + size * (left - config.smallest)
        ratio = math.exp(lowest + form * (highest - lowest))
        height, width = max(1, round(math.sqrt(area * ratio))), max(1, round(math.sqrt(area / ratio)))
        if height > rows or width > columns:
            continue
        top, first = math.floor(down * (rows - height + 1)), math.floor(right * (columns - width + 1))
        lines = every_row & (1 << columns * height) - 1
        more = masked | (lines * ((1 << width) - 1) << top * columns + first)
        if more.bit_count() <= count:
            masked, left = more, count - more.bit_count()
    octets = np.frombuffer(masked.to_bytes(-(-rows * columns // 8), "little"), dtype=np.uint8)
    where = np.unpackbits(octets, count=rows * columns, bitorder="little").view(np.bool_)
    if left:
        where[generator.choice(np.flatnonzero(~where), left, replace=False, shuffle=False)] = True
    return where.reshape(rows, columns)
