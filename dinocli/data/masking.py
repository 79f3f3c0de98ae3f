"""Masking: which patches of the global crops the student does not see, in blocks and to an exact count."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, PositiveInt, field_validator
from torch import Tensor

from dinocli.config import Config

Grid = tuple[int, int]  # rows and columns of a crop's patches
Where = NDArray[np.bool_]

# Images that shares are dealt to at once, where a process's batch is made up of so many: then what is hidden does not
# depend on how many processes there are. Their masked crops have a mean share of 0.306, endless ones would have 0.3.
_DEALT_TO = 32
_TRIES = 32  # blocks drawn for a crop: twelve are enough for 99 % of 14 by 14 patches, sixteen for 98 % of 32 by 32
# No view has this number, so that the dealing out shares its random numbers with no crop's blocks.
_DEALT = 2**31


class MaskConfig(Config):
    """Which part of the global crops is hidden; the paper's is 0.5 of them, from 0.1 to 0.5 of their patches.

    The shares of the masked crops lie in equal steps between `ratio`'s two, the highest among them, and not drawn one
    by one, to 32 images at a time: so batches of one size hide the same number of patches, and shapes stay fixed.
    iBOT hides nothing in one half of the crops and a share drawn in 0.3 +- 0.2 in the other: that is `share = 0.5`,
    `ratio = [0.1, 0.5]` too, but that there a coin is tossed for each crop.
    Its Swin recipe masks from epoch 50 on; that has no place here.

    Attributes:
        share: Of the global crops of a batch, those that have a mask at all; rounded to a whole number of them.
        ratio: Lowest and highest share of a masked crop's patches that are hidden.
        smallest: Patches of a block, at least; what is left to hide below that is hidden patch by patch.
        aspect: Lowest and highest height by width of a block, drawn evenly on the log scale.

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
            raise ValueError("two shares of the patches were wanted, the smaller first")
        return ratio

    @field_validator("aspect")
    @classmethod
    def _are_ratios(cls, aspect: tuple[float, float]) -> tuple[float, float]:
        if not 0 < aspect[0] <= aspect[1] < math.inf:
            raise ValueError("two ratios of height by width were wanted, the smaller first")
        return aspect


@dataclass(frozen=True)
class Masks:
    """The hidden patches of a batch's global crops.

    Attributes:
        where: Whether a patch is hidden. [G, B, N], bool
        rows: Which of the G*B*N patches are hidden, ascending. [M], int64
        weights: Of each hidden patch: 1 / (hidden patches of its crop) / (G*B), so that a sum over the hidden patches
            is a mean over all crops of the mean over a crop. [M], float32
        counts: Hidden patches of each crop; on the host, so that nobody waits for the device to tell. [G, B], int64
    """

    where: Tensor
    rows: Tensor
    weights: Tensor
    counts: Tensor

    @classmethod
    def of(cls, where: Tensor) -> Masks:
        """Rows and weights of hidden patches, all on the host. [G, B, N], bool"""
        counts = where.sum(-1)
        weights = 1 / counts.clamp(min=1).double() / counts.numel()
        rows = where.flatten().nonzero()[:, 0]
        return cls(where, rows, weights.flatten().repeat_interleave(counts.flatten()).float(), counts)

    def split(self, count: int) -> list[Masks]:
        """The masks of `count` parts of the images, in order; the losses of equal parts have the whole's as their mean.

        A part may hide more than another: only the whole has a fixed number of hidden patches.
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
            parts.append(Masks(where, torch.cat(rows), torch.cat(weights) * (images / size), each))
            first += size
        return parts


def hidden_counts(config: MaskConfig, crops: int, patches: int) -> list[int]:
    """How many patches each masked crop of a group hides, fewest first; they are as many as crops have a mask.

    Slot i of n hides the upper edge of the i-th of n equal steps from the lowest share to the highest, and one patch at
    least.

    Args:
        config: The shares.
        crops: Global crops that they are dealt to.
        patches: Of a crop: N.
    """
    masked = round(config.share * crops)
    edges = np.linspace(*config.ratio, masked + 1)[1:]
    return [max(1, round(patches * edge)) for edge in edges.tolist()]


def _groups(images: int) -> int:
    """In how many groups a process's images are dealt masks: in groups of 32, or as one where these do not fit."""
    return images // _DEALT_TO if images % _DEALT_TO == 0 else 1


def hidden_in_all(config: MaskConfig, crops: tuple[int, int], patches: int) -> int:
    """Hidden patches of a process's batch: M. `crops` and `patches` are those of `deal`."""
    count = _groups(crops[1])
    return count * sum(hidden_counts(config, crops[0] * crops[1] // count, patches))


def deal(config: MaskConfig, crops: tuple[int, int], patches: int, *, seed: int, batch: int, rank: int) -> Tensor:
    """Hidden patches of each crop of a batch, shuffled; 0 where a crop has no mask. [G, B], int64

    Every process hides as many; and two processes with 32 images each hide what one does with these 64.

    Args:
        config: The shares.
        crops: G and B, of this process.
        patches: Of a crop: N.
        seed: Of the run.
        batch: Its number in the run.
        rank: Of the process whose batch it is.
    """
    views, images = crops
    count = _groups(images)
    counts = np.zeros(views * images // count, dtype=np.int64)
    masked = hidden_counts(config, len(counts), patches)
    counts[: len(masked)] = masked
    dealt = [
        np.random.default_rng((seed, batch, group, _DEALT)).permutation(counts).reshape(views, -1)
        for group in range(rank * count, (rank + 1) * count)
    ]
    return torch.from_numpy(np.concatenate(dealt, axis=1))


def generator_of(seed: int, epoch: int, index: int, view: int) -> np.random.Generator:
    """Random numbers for the blocks of an image's view, which depend on nothing else and are no other draw's."""
    # A 0 at the end would give the very numbers of the image's crops.
    return np.random.default_rng((seed, epoch, index, 1 + view))


def blocks(config: MaskConfig, grid: Grid, count: int, generator: np.random.Generator) -> Where:
    """Hide exactly `count` patches, in rectangles as far as that goes. [rows, columns]

    A rectangle's area is drawn between the smallest and what is left to hide, its place among all where it fits. One
    that would hide too many is passed over. What is left at last is hidden patch by patch.

    Args:
        config: The rectangles.
        grid: Rows and columns.
        count: Patches to hide, at most all.
        generator: Of the random numbers; it is asked for the same many each time until patches are hidden one by one.
    """
    rows, columns = grid
    lowest, highest = (math.log(ratio) for ratio in config.aspect)
    # Patch i is bit i of a whole number: a rectangle is put on and counted in a tenth of the time that arrays take.
    every_row = sum(1 << columns * i for i in range(rows))
    hidden, left = 0, count
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
        more = hidden | (lines * ((1 << width) - 1) << top * columns + first)
        if more.bit_count() <= count:
            hidden, left = more, count - more.bit_count()
    octets = np.frombuffer(hidden.to_bytes(-(-rows * columns // 8), "little"), dtype=np.uint8)
    where = np.unpackbits(octets, count=rows * columns, bitorder="little").view(np.bool_)
    if left:
        where[generator.choice(np.flatnonzero(~where), left, replace=False, shuffle=False)] = True
    return where.reshape(rows, columns)
