"""Loader: endless batches of views for training, and one pass of plain images for everything else."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dinocli.data import ring
from dinocli.data.augment import augment, normalize
from dinocli.data.cache import PixelCache
from dinocli.data.crops import Draws, ViewsConfig
from dinocli.data.fill import Cutter, ImageFiller, PlainFiller, StreamFiller
from dinocli.data.images import DEFAULTS, ImagesConfig
from dinocli.data.masking import Grid, MaskConfig, Masks, deal
from dinocli.data.ring import Filler, Ring
from dinocli.data.shards import Shards
from dinocli.data.sources import Images, Source
from dinocli.errors import DinoError

BAD_SHARE = 0.05
_WAITING_BYTES = 8 * 2**30
_SLOTS = 4


@dataclass(frozen=True)
class Batch:
    """Views of B images, ready for the networks.

    Attributes:
        global_crops: [G, B, C, H, W]
        local_crops: [V-G, B, C, h, w]; absent where there are no local views.
        rows: Number of each image in its source. [B], on the host
        masks: Patches of the global crops that the student does not see; absent where it sees all.
    """

    global_crops: Tensor
    local_crops: Tensor | None
    rows: Tensor
    masks: Masks | None = None

    @property
    def crops(self) -> list[Tensor]:
        """All views, a group a resolution, global ones first."""
        return [self.global_crops] if self.local_crops is None else [self.global_crops, self.local_crops]

    def split(self, count: int) -> list[Batch]:
        """Its images in `count` batches of the same size, in order."""
        if count == 1:
            return [self]
        globals_, rows = self.global_crops.chunk(count, 1), self.rows.chunk(count)
        locals_ = [None] * count if self.local_crops is None else self.local_crops.chunk(count, 1)
        masks = [None] * count if self.masks is None else self.masks.split(count)
        return [Batch(*part) for part in zip(globals_, locals_, rows, masks, strict=True)]


@dataclass
class BadFiles:
    """Files that could not be read, with the reason; a file counts once however often it is drawn."""

    reasons: dict[str, str] = field(default_factory=dict)

    def summary(self) -> str:
        """Counts by reason in one line, the most frequent first."""
        counts = Counter(reason.split(":")[0] for reason in self.reasons.values()).most_common(4)
        return ", ".join(f"{count} {reason}" for reason, count in counts)


class Share(NamedTuple):
    """Which process of a run this is: rank `rank` of `of`."""

    rank: int
    of: int


ALONE = Share(0, 1)


class TrainBatches:
    """Endless batches in an order and with views that depend on the seed alone.

    Each image comes once an epoch, in the epoch's own order, and what does not fill a batch is dropped. The views of an
    image depend on seed, epoch and its number: not on how many processes work, nor on where a run was taken up again.
    From tar shards the images come in the order in which they lie there, shuffled in a buffer, each worker with shards
    of its own: there the order depends on the number of workers too. A file that cannot be read is replaced by another
    draw, so that batches keep their size.

    Args:
        source: The images.
        views: The views to make.
        batch_size: B, of this process.
        seed: Of the order and of all views.
        images: How files become pixels.
        start: Batches to pass over, for a run that goes on.
        steps_per_epoch: Batches of an epoch, in which the views' low resolution is counted.
        workers: Processes that decode and crop; 0 does it in this one.
        device: Where color and blur are done, and where the batches lie.
        share: Which part of each batch of the run is this process's.
        cache: `ram`, or a folder, to keep decoded images in; absent, each is decoded whenever it is drawn.
        compiled: Whether torch compiles the turn of the hue, the longest of what is done to the views.
        grid: Rows and columns of a global crop's patches by its size, where the views have a mask: how many patches of
            each crop are hidden depends on seed, batch and the image's place in it (and on the number of processes,
            where their shares are no multiples of 32), and which ones on seed, epoch and the image's number.

    Attributes:
        bad: The files that could not be read.
        cache: What was kept, if anything is.

    Raises:
        DinoError: While iterating: more than 5 % of the images cannot be read, or a worker was killed.
    """

    def __init__(
        self,
        source: Source,
        views: ViewsConfig,
        *,
        batch_size: int,
        seed: int,
        images: ImagesConfig = DEFAULTS,
        start: int = 0,
        steps_per_epoch: int = 1,
        workers: int = 0,
        device: torch.device,
        share: Share = ALONE,
        cache: str | None = None,
        compiled: bool = False,
        grid: Callable[[int], Grid | None] = lambda size: None,
    ) -> None:
        self._compiled = compiled
        self.bad = BadFiles()
        self._source, self._views, self._device, self._seen = source, views, device, 0
        self._batch_size = batch_size
        phases = [
            (first, _fields(those, batch_size) | _mask_fields(those, batch_size, grid(those.global_1.size)))
            for first, those in views.phases(steps_per_epoch)
        ]
        cutter = Cutter(views, seed, images)
        kept = None
        if cache and isinstance(source, Images):
            kept = PixelCache(len(source), views.all, cache, views.channels)
        self.cache = kept
        make: Callable[[int, int], Filler[tuple[str, str]]]
        if isinstance(source, Shards):
            if cache:
                raise DinoError(
                    "--cache is for images that can be asked for in any order; shards come in a stream", "leave it out"
                )
            make = partial(_stream_filler, cutter, source, batch_size, start, workers, share)
        else:
            make = partial(_image_filler, cutter, source, kept)
        order = _Order(source, batch_size, seed, share, views.mask)
        self._ring = Ring(
            phases,
            batch_size=batch_size,
            make=make,
            prepare=order.write,
            workers=workers,
            slots=min(_slots(fields) for _, fields in phases),
            start=start,
            bound=isinstance(source, Shards),
            pin=device.type == "cuda",
        )

    @property
    def waited(self) -> float:
        """Seconds that this process has waited for batches."""
        return self._ring.waited

    def close(self) -> None:
        """End the workers."""
        self._ring.close()

    def __iter__(self) -> Iterator[Batch]:
        mean, std = (torch.tensor(v, device=self._device) for v in (self._views.mean, self._views.std))
        copier = _Copier(self._device)
        n = len(self._views.globals)
        for slot, arrays, bad in self._ring:
            self._count(bad)
            drawn = Draws(*(arrays[name].clone() for name in Draws._fields))
            rows = arrays["keys"][:, 1].clone()
            masks = copier.masks(Masks.of(arrays["where"].flatten(2).clone())) if "where" in arrays else None
            groups = [copier(arrays[name]) for name in ("globals", "locals") if arrays[name].numel()]
            copier.wait()
            parts = (slice(0, n), slice(n, None))
            crops = [
                augment(group, Draws(*(d[part] for d in drawn)), mean, std, compiled=self._compiled)
                for group, part in zip(groups, parts, strict=False)
            ]
            copier.done(slot, self._ring.release)
            yield Batch(crops[0], crops[1] if len(crops) > 1 else None, rows, masks)

    def _count(self, bad: list[tuple[str, str]]) -> None:
        self.bad.reasons.update(bad)
        self._seen += self._batch_size
        # Of a stream nobody knows how long it is: what was seen so far stands for it, once that is something.
        known = self._source.count if isinstance(self._source, Shards) else len(self._source)
        total = known or max(self._seen, 20 * self._batch_size)
        if len(self.bad.reasons) > max(1, BAD_SHARE * total):
            first = next(iter(self.bad.reasons))
            where = f"{self._source.root / first}" if isinstance(self._source, Images) else first
            raise DinoError(
                f"{len(self.bad.reasons)} of {total} images cannot be read ({self.bad.summary()}); "
                f"up to {BAD_SHARE:.0%} are passed over",
                f"mend them or take them out; one is {where}",
            )


# What a worker begins with: functions of the module's own, since where processes are not copied they are sent by name.


def _image_filler(cutter: Cutter, source: Images, cache: PixelCache | None, lane: int, lanes: int) -> ImageFiller:
    return ImageFiller(cutter, source, cache)


def _stream_filler(
    cutter: Cutter, source: Shards, batch_size: int, start: int, workers: int, share: Share, lane: int, lanes: int
) -> StreamFiller:
    skip = ring.turns(lane, workers, batch_size, start)
    first, most = share.rank * lanes + lane, cutter.images.max_megabytes
    stream = source.stream(first, share.of * lanes, seed=cutter.seed, skip=skip, max_megabytes=most)
    return StreamFiller(cutter, stream)


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
    # Every process reads the whole stream, and passes over what is in the batches of others.
    before = partial(ring.turns_before, lane, workers, batch_size)
    stream = source.stream(lane, lanes, max_megabytes=images.max_megabytes)
    return PlainFiller(stream, size, images, before, cutter)


class _Copier:
    """Moves what is in a slot to the device: beside its work on CUDA, not at all on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.busy: deque[tuple[Any, int]] = deque()

    def __call__(self, values: Tensor) -> Tensor:
        if self.stream is None:
            return values.to(self.device)
        with torch.cuda.stream(self.stream):
            moved = values.to(self.device, non_blocking=True)
        # Its memory was taken on the side stream and is read on the main one: it may not be used again before that.
        moved.record_stream(torch.cuda.current_stream(self.device))
        return moved

    def masks(self, masks: Masks) -> Masks:
        """Masks of the host; before the crops, for they are few bytes and the host would wait for many before them."""
        return Masks(self(masks.where), self(masks.rows), self(masks.weights), masks.counts)

    def wait(self) -> None:
        """Let what the device does next wait for the copies; the host does not wait."""
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def done(self, slot: int, release: Any) -> None:
        """Release slots whose copies are over: this one at once, or on CUDA those of batches before it."""
        if self.stream is None:
            release(slot)
            return
        self.busy.append((self.stream.record_event(), slot))
        # One copy may be under way while the device works; before that its slot's memory must not be written.
        while len(self.busy) > 1 or (self.busy and self.busy[0][0].query()):
            event, free = self.busy.popleft()
            event.synchronize()
            release(free)


def _fields(views: ViewsConfig, batch_size: int) -> ring.Fields:
    """The arrays of a batch: crops with the channels last, as decoders give them, and what their images' draws say."""
    v, g, b, c = len(views.all), len(views.globals), batch_size, views.channels
    large, small = views.global_1.size, views.local.size if views.local else 0
    return {
        "keys": ring.Field((b, 2), torch.int64),  # epoch and number of each image
        "globals": ring.Field((g, b, large, large, c), torch.uint8),
        "locals": ring.Field((v - g, b, small, small, c), torch.uint8),
        "flip": ring.Field((v, b), torch.bool),
        "factors": ring.Field((v, b, 4), torch.float32),
        "order": ring.Field((v, b, 4), torch.uint8),
        "gray": ring.Field((v, b), torch.bool),
        "radius": ring.Field((v, b), torch.float32),
        "solarize": ring.Field((v, b), torch.bool),
    }


def _mask_fields(views: ViewsConfig, batch_size: int, grid: Grid | None) -> ring.Fields:
    """The arrays that say what is hidden, and how much of each crop."""
    if not views.mask:
        return {}
    if not grid:
        raise DinoError("views.mask hides patches, and this backbone has none", "--set views.mask=none")
    crops = (len(views.globals), batch_size)
    return {"where": ring.Field((*crops, *grid), torch.bool), "counts": ring.Field(crops, torch.int64)}


def _slots(fields: ring.Fields) -> int:
    """A few batches wait, and never more of them than the budget of memory."""
    batch_bytes = sum(torch.Size(f.shape).numel() * f.dtype.itemsize for f in fields.values())
    return max(2, min(_SLOTS, _WAITING_BYTES // batch_bytes))


class _Order:
    """Which images a batch holds: each once an epoch, in the epoch's own order; the rest is dropped.

    And how many patches of each of their global crops are hidden, where the views have a mask.
    """

    def __init__(
        self, source: Source, batch_size: int, seed: int, share: Share, mask: MaskConfig | None = None
    ) -> None:
        self.images = None if isinstance(source, Shards) else len(source)
        self.batch_size, self.seed, self.share, self.mask = batch_size, seed, share, mask
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def write(self, slot: dict[str, Tensor], batch: int) -> None:
        """Write epoch and number of each image of a batch; of a stream they are known when they come."""
        if self.mask:
            views, images, *grid = slot["where"].shape
            dealt = deal(self.mask, (views, images), math.prod(grid), seed=self.seed, batch=batch, rank=self.share.rank)
            slot["counts"].copy_(dealt)
        if self.images is None:
            return
        whole = self.batch_size * self.share.of
        epoch, place = divmod(batch, self.images // whole)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng((self.seed, epoch, _ORDER)).permutation(self.images)
        first = place * whole + self.share.rank * self.batch_size
        slot["keys"][:, 0] = epoch
        slot["keys"][:, 1] = torch.from_numpy(self._order[first : first + self.batch_size])


# No image has this number, so that the order shares its random numbers with no image's views.
_ORDER = 2**63 - 1


class Plain(NamedTuple):
    """Images of one pass.

    Attributes:
        images: Normalized. [B, C, size, size]
        names: Of each.
        labels: Of each, -1 where there is none.
        bad: Name and reason of those that could not be read and are left out.
        views: Views of each beside it, where they were asked for. [V, B, C, size, size]
    """

    images: Tensor
    names: list[str]
    labels: list[int]
    bad: list[tuple[str, str]]
    views: Tensor | None = None


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
    share: Share = ALONE,
    cutter: Cutter | None = None,
) -> Iterator[Plain]:
    """All images once, as the evaluation sees them: resized, cropped in the middle, normalized.

    They come in the order of the source; from tar shards and several workers, in that of the workers' turns. Several
    processes take the batches in turns, each of which holds what it would hold in one; it may be empty.

    A cutter makes views beside each image, all of one side. They depend on its seed and the image's number alone.
    """
    fields = {"images": ring.Field((batch_size, len(mean), size, size), torch.uint8)}
    if cutter:
        fields |= _fields(cutter.views, batch_size)
    filled = Ring(
        [(0, fields)],
        batch_size=batch_size,
        make=partial(_plain_filler, source, size, images, cutter, batch_size, workers),
        prepare=lambda slot, batch: None,
        workers=workers,
        slots=_slots(fields),
        start=share.rank,
        stride=share.of,
        bound=isinstance(source, Shards),
        pin=device.type == "cuda",
    )
    there = [torch.tensor(values, device=device) for values in (mean, std)]
    empty = 0
    try:
        for slot, arrays, told in filled:
            seen = sorted(told)
            good = [s for s in seen if not s.reason]
            kept = [s.place for s in good]
            pixels = arrays["images"][kept].to(device)
            views = _views(arrays, kept, *there) if cutter and kept else None
            filled.release(slot)
            # One worker's stream may end before another's: it is over when each has had a turn with nothing in it.
            empty = 0 if seen else empty + 1
            if empty > (workers if isinstance(source, Shards) else 0):
                return
            if seen or share.of > 1:
                bad = [(s.name, s.reason) for s in seen if s.reason]
                names, labels = [s.name for s in good], [s.label for s in good]
                yield Plain(normalize(pixels.float() / 255, *there), names, labels, bad, views)
    finally:
        filled.close()


def _views(arrays: dict[str, Tensor], kept: list[int], mean: Tensor, std: Tensor) -> Tensor:
    """The views of some images of a slot, on the device of mean and spread. [V, B, C, H, H]"""
    crops = torch.cat([arrays[name][:, kept] for name in ("globals", "locals") if arrays[name].numel()])
    drawn = Draws(*(arrays[name][:, kept] for name in Draws._fields))
    return augment(crops.to(mean.device), drawn, mean, std)
