"""Batches of images without augmentation, in one pass, for everything except pretraining."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from dinocli.core.copies import send
from dinocli.data.images import DEFAULTS, ImagesConfig
from dinocli.data.loader import ring
from dinocli.data.loader.batch import ALONE, Shard, slots_for, view_fields
from dinocli.data.loader.copier import Copier
from dinocli.data.loader.fill import Cutter, PlainFiller, Seen
from dinocli.data.loader.ring import Ring
from dinocli.data.sources.indexed import Images
from dinocli.data.sources.open import Source
from dinocli.data.sources.shards import Shards
from dinocli.data.views.augment import augment, normalize
from dinocli.data.views.augment_bytes import normalize_bytes
from dinocli.data.views.crops import Draws


def _plain_filler(
    source: Source,
    size: int,
    images: ImagesConfig,
    cutter: Cutter | None,
    batch_size: int,
    workers: int,
    lane: int,
    lanes: int,
) -> PlainFiller:
    if isinstance(source, Images):
        return PlainFiller(source, size, images, cutter=cutter)
    # Every process reads the whole stream, and skips the images in the batches of others.
    before = partial(ring.turns_before, lane, workers, batch_size)
    stream = source.stream(lane, lanes, max_megabytes=images.max_megabytes)
    return PlainFiller(stream, size, images, before, cutter)


class Plain(NamedTuple):
    """Batch of images from one pass.

    Attributes:
        images: Normalized images. [B, C, size, size]
        names: Name per image.
        labels: Class index per image, -1 if unlabelled.
        bad: Name and reason of each unreadable image; these are skipped.
        views: Additional views per image, if requested. [V, B, C, size, size]
        number: Number of the batch among all batches of the source.
    """

    images: Tensor
    names: list[str]
    labels: list[int]
    bad: list[tuple[str, str]]
    views: Tensor | None = None
    number: int = 0


def plain_batches(
    source: Source,
    *,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int,
    workers: int,
    device: torch.device,
    images: ImagesConfig = DEFAULTS,
    shard: Shard = ALONE,
    cutter: Cutter | None = None,
) -> Iterator[Plain]:
    """Yield all images once, preprocessed for evaluation: resized, center-cropped, normalized.

    Images keep the order of the source; from tar shards with several workers, workers take turns. With several
    processes, each gets every n-th batch. Batches are the same as in a single process, and may be empty.

    A cutter adds views of each image, all of one size. They depend on its seed and the image's number alone.
    """
    fields = {"images": ring.Field((batch_size, len(mean), size, size), torch.uint8)}
    if cutter:
        fields |= view_fields(cutter.views, batch_size)
    filled = Ring(
        [(0, fields)],
        batch_size=batch_size,
        make=partial(_plain_filler, source, size, images, cutter, batch_size, workers),
        prepare=lambda slot, batch: None,
        workers=workers,
        slots=slots_for(fields),
        start=shard.rank,
        stride=shard.processes,
        bound=isinstance(source, Shards),
        pin=device if device.type == "cuda" else None,
    )
    there = [torch.tensor(values, device=device) for values in (mean, std)]
    copier, empty = Copier(device), 0

    def finish(number: int, slot: int, arrays: dict[str, Tensor], seen: list[Seen]) -> Plain:
        """Move a slot to the device, and release it."""
        good = [s for s in seen if not s.reason]
        kept = [s.place for s in good]
        # Whole arrays, because only they are pinned; rows are selected on the device.
        names = ["images", *(name for name in ("globals", "locals") if cutter and kept and arrays[name].numel())]
        pixels, *crops = (copier(arrays[name], needed=bool(kept)) for name in names)
        copier.wait()
        normal = normalize(_select(pixels, kept).float() / 255, *there)
        views = None
        if crops and cutter:
            drawn = Draws(*(arrays[name][:, kept] for name in Draws._fields))
            views = _views(crops, kept, drawn, *there, finished=cutter.finishes)
        copier.done(slot, filled.release)
        bad = [(s.name, s.reason) for s in seen if s.reason]
        return Plain(normal, [s.name for s in good], [s.label for s in good], bad, views, number)

    try:
        for number, (slot, arrays, told) in zip(itertools.count(shard.rank, shard.processes), filled, strict=False):
            seen = sorted(told)
            # One worker's stream may end before another's: the pass ends once every worker had an empty turn.
            empty = 0 if seen else empty + 1
            if empty > (workers if isinstance(source, Shards) else 0):
                return
            if seen or shard.processes > 1:
                yield finish(number, slot, arrays, seen)  # without a name: the next batch needs its memory
            else:
                filled.release(slot)
    finally:
        filled.close()


def _views(groups: list[Tensor], kept: list[int], drawn: Draws, mean: Tensor, std: Tensor, *, finished: bool) -> Tensor:
    """Return the views of some images of a slot, on the device of `mean` and `std`. [V, B, C, H, H]

    Args:
        groups: Crops of the slot, in groups, on that device. [v, B, H, H, C] each
        kept: Places of the images in the slot.
        drawn: Draws of these images, on the host.
        mean: Channel means of the data.
        std: Channel standard deviations of the data.
        finished: True if the crops are views already, in bytes.
    """
    crops = torch.cat([_select(group, kept, 1) for group in groups])
    return normalize_bytes(crops, mean, std) if finished else augment(crops, drawn, mean, std)


def _select(values: Tensor, kept: list[int], dim: int = 0) -> Tensor:
    """Return the kept images of a slot's array; the first ones, as in nearly every batch, without a copy."""
    if kept == list(range(len(kept))):
        return values.narrow(dim, 0, len(kept))
    return values.index_select(dim, send(torch.tensor(kept), values.device))
