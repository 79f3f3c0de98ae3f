"""Loader: endless batches of views for training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinocli.core.errors import DinoError
from dinocli.data.images import DEFAULTS, ImagesConfig
from dinocli.data.loader import ring
from dinocli.data.loader.batch import ALONE, BadFiles, Batch, Shard, file_fields, mask_fields, slots_for, view_fields
from dinocli.data.loader.cache import PixelCache
from dinocli.data.loader.copier import Copier
from dinocli.data.loader.fill import Cutter, FileFiller, ImageFiller, StreamFiller
from dinocli.data.loader.mixture import epoch_order
from dinocli.data.loader.on_device import DeviceCutter
from dinocli.data.loader.ring import Filler, Ring
from dinocli.data.sources.clips import Clips, clips_of
from dinocli.data.sources.indexed import Images
from dinocli.data.sources.open import Source
from dinocli.data.sources.shards import Shards
from dinocli.data.views.augment import augment
from dinocli.data.views.augment_bytes import normalize_bytes
from dinocli.data.views.compiled_bytes import compile_library, normalize_compiled
from dinocli.data.views.crops import Draws, SizeDraw, ViewConfig, ViewsConfig
from dinocli.data.views.device_crops import Stored
from dinocli.data.views.masking import Grid, MaskConfig, PatchMasks, deal

BAD_SHARE = 0.05


class TrainBatches:
    """Endless batches whose order and views depend on the seed alone.

    Each image appears once per epoch, in a new order every epoch; the last, incomplete batch is dropped. Of sources
    that are joined by shares, each has its share of an epoch. The views of an image depend on the seed, the epoch and
    its number, but not on the number of processes or on where a run resumed.
    Images from tar shards come in stored order, shuffled in a buffer. Each worker has its own shards, so this order
    depends on the number of workers too. An unreadable file is replaced by another draw, so batches keep their size.

    Args:
        source: Images to draw from.
        views: Views to cut from each image.
        batch_size: Images per batch in this process (B).
        seed: Seed of the order and of all views.
        images: Decoding settings. With `pair_within`, the second global view of a frame of a video is cut from another
            frame, which depends on what the views depend on.
        start: Number of batches to skip, when a run resumes.
        steps_per_epoch: Batches per epoch, the unit of the views' low-resolution phase.
        workers: Processes that decode and crop; 0 uses this process.
        device: Device of the batches. A CUDA device also applies color jitter and blur; on a CPU, the workers do.
        shard: Share of this process in each batch of the run.
        cache: `ram`, or a folder, for decoded images. If None, an image is decoded whenever it is drawn.
        compiled: True to compile the augmentation of a GPU with torch.compile. That of a CPU is compiled as C++ in any
            case, if there is a compiler.
        grid: Function from the size of a global crop to its rows and columns of patches, for masking. The number of
            masked patches per crop depends on seed, batch and the image's place in it (and on the number of processes,
            unless each has a multiple of 32 images). Their positions depend on seed, epoch and the image's number.
        clean: Side of clean crops relative to the global crops'. If None, there are no clean crops.
        in_order: True to yield the fixed views of all images by place instead of shuffling: each once, then again from
            the first.
        on_device: True to decode JPEGs on the device and cut their crops there, if that gives the same pixels.
        dtype: Type of views that are made on a GPU; those of a CPU are float32.
        note: Callback that receives one-line messages for the user.

    Attributes:
        bad: Files that cannot be read.
        cache: Cache of decoded images, or None.

    Raises:
        DinoError: If no image has another frame for its second view. While iterating, if more than 5 % of the images
            cannot be read, or a worker is killed.
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
        shard: Shard = ALONE,
        cache: str | None = None,
        compiled: bool = False,
        grid: Callable[[int], Grid | None] = lambda size: None,
        clean: float | None = None,
        in_order: bool = False,
        on_device: bool = False,
        dtype: torch.dtype = torch.float32,
        note: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._compiled, self._dtype = compiled, dtype
        self.bad = BadFiles()
        self._device_cutter: DeviceCutter | None = None
        self._source, self._views, self._device, self._seen = source, views, device, 0
        self._batch_size = batch_size
        known = views.fixed and not isinstance(source, Shards)
        places = {"places": ring.Field((batch_size,), torch.int64)} if known else {}
        crops = len(views.all) + (len(views.globals) if clean else 0)
        files = file_fields(crops, batch_size) if on_device else {}
        phases = [
            (
                first,
                view_fields(those, batch_size, clean)
                | mask_fields(those, batch_size, grid(those.global_1.size))
                | places
                | files,
            )
            for first, those in ([(0, mix) for _, mix in views.mixes] or views.phases(steps_per_epoch))
        ]
        self._finished = device.type == "cpu" and not on_device
        self._library = compile_library() if self._finished else None
        cutter = Cutter(views, seed, images, finish=self._finished, library=self._library)
        kept = None
        if cache and isinstance(source, Images):
            largest = [view for those in views.variants for view in _list_cuts(those, clean)]
            kept = PixelCache(len(source), largest, cache, views.channels)
        self.cache = kept
        make: Callable[[int, int], Filler[tuple[str, str]]]
        if isinstance(source, Shards):
            if cache:
                raise DinoError(
                    "--cache needs random access to images; shards are read as a stream", "run without --cache"
                )
            make = partial(_stream_filler, cutter, source, batch_size, start, workers, shard)
        else:
            clips = clips_of(source, images.pair_within) if images.pair_within and views.global_2 else None
            make = partial(_image_filler, cutter, source, kept, clips, on_device)
            if on_device:
                self._device_cutter = DeviceCutter(ImageFiller(cutter, source, clips=clips), device, note)
        order = _Order(source, batch_size, seed, shard, views.mask, views.fixed, in_order=in_order)
        self._ring = Ring(
            phases,
            batch_size=batch_size,
            make=make,
            prepare=partial(_prepare, order, self._device_cutter),
            workers=workers,
            slots=min(slots_for(fields) for _, fields in phases),
            start=start,
            bound=isinstance(source, Shards),
            pin=device if device.type == "cuda" else None,
            pick=SizeDraw(seed, tuple(share for share, _ in views.mixes)) if views.mixed else None,
        )

    @property
    def share_on_device(self) -> float | None:
        """Share of the images so far that the device has decoded, or None if it decodes none."""
        return self._device_cutter.decoded / max(1, self._seen) if self._device_cutter else None

    @property
    def waited(self) -> float:
        """Seconds this process has waited for batches."""
        return self._ring.waited

    def close(self) -> None:
        """Stop the workers."""
        self._ring.close()

    def __iter__(self) -> Iterator[Batch]:
        mean, std = (torch.tensor(v, device=self._device) for v in (self._views.mean, self._views.std))
        copier = Copier(self._device)
        n = len(self._views.globals)
        for slot, arrays, bad in self._ring:
            stored: list[Stored] = []
            if self._device_cutter:
                with copier.beside():
                    stored, refused = self._device_cutter.decode(arrays)
                bad = bad + refused
            self._count(bad)
            drawn = Draws(*(arrays[name].clone() for name in Draws._fields))
            rows = arrays["keys"][:, 1].clone()
            places = arrays["places"].clone() if "places" in arrays else None
            masks = copier.masks(PatchMasks.of(arrays["where"].flatten(2).clone())) if "where" in arrays else None
            names = [name for name in ("globals", "locals", "clean") if name in arrays and arrays[name].numel()]
            moved = {name: copier(arrays[name], needed=len(stored) < self._batch_size) for name in names}
            if self._device_cutter and stored:
                with copier.beside():
                    self._device_cutter.cut(list(moved.values()), stored)
            clean = moved.pop("clean", None)
            groups = list(moved.values())
            copier.wait()
            parts = (slice(0, n), slice(n, None))
            if self._finished:
                crops = [self._normalized(group, mean, std) for group in groups]
                clean = None if clean is None else self._normalized(clean, mean, std)
            else:
                crops = [
                    augment(
                        group, Draws(*(d[part] for d in drawn)), mean, std, compiled=self._compiled, dtype=self._dtype
                    )
                    for group, part in zip(groups, parts, strict=False)
                ]
                clean = None if clean is None else augment(clean, drawn.flips_only(n), mean, std, dtype=self._dtype)
            copier.done(slot, self._ring.release)
            yield Batch(crops[0], crops[1] if len(crops) > 1 else None, rows, masks, clean, places)

    def _normalized(self, views: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        if self._library:
            return normalize_compiled(views, mean, std, self._library)
        return normalize_bytes(views, mean, std)

    def _count(self, bad: list[tuple[str, str]]) -> None:
        self.bad.reasons.update(bad)
        self._seen += self._batch_size
        # The length of a stream is unknown: use the images so far instead, but at least those of 20 batches.
        known = self._source.count if isinstance(self._source, Shards) else len(self._source)
        total = known or max(self._seen, 20 * self._batch_size)
        if len(self.bad.reasons) > max(1, BAD_SHARE * total):
            first = next(iter(self.bad.reasons))
            where = (
                f"{self._source.root / first}" if isinstance(self._source, Images) and self._source.in_files else first
            )
            raise DinoError(
                f"{len(self.bad.reasons)} of {total} images cannot be read ({self.bad.summary()}); "
                f"up to {BAD_SHARE:.0%} may be skipped",
                f"repair or remove them; one is {where}",
            )


def _prepare(order: _Order, device_cutter: DeviceCutter | None, slot: dict[str, Tensor], batch: int) -> None:
    """Write into a slot, before it is filled, what workers need to know of its batch."""
    order.write(slot, batch)
    if device_cutter:
        slot["refused"].fill_(device_cutter.fails)


def _list_cuts(views: ViewsConfig, clean: float | None) -> list[ViewConfig]:
    """Return all views that are cut from an image, with the size of their crop; clean crops are views too."""
    if clean is None:
        return views.all
    return views.all + [view.model_copy(update={"size": views.clean_size(clean)}) for view in views.globals]


# Workers start with these module-level functions: spawned processes receive them by name.


def _image_filler(
    cutter: Cutter, source: Images, cache: PixelCache | None, clips: Clips | None, files: bool, lane: int, lanes: int
) -> ImageFiller:
    return (FileFiller if files else ImageFiller)(cutter, source, cache, clips)


def _stream_filler(
    cutter: Cutter, source: Shards, batch_size: int, start: int, workers: int, shard: Shard, lane: int, lanes: int
) -> StreamFiller:
    skip = ring.turns(lane, workers, batch_size, start)
    first, most = shard.rank * lanes + lane, cutter.images.max_megabytes
    stream = source.stream(first, shard.processes * lanes, seed=cutter.seed, skip=skip, max_megabytes=most)
    return StreamFiller(cutter, stream)


class _Order:
    """Order of the images: reshuffled every epoch, each once or by shares; the last, incomplete batch is dropped.

    If the views are masked, it also sets the number of masked patches per global crop.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        seed: int,
        shard: Shard,
        mask: MaskConfig | None = None,
        fixed: int | None = None,
        *,
        in_order: bool = False,
    ) -> None:
        self.images = None if isinstance(source, Shards) else len(source)
        self.mixture = [] if isinstance(source, Shards) else source.mixture
        self.blocks = None if isinstance(source, Shards) else source.blocks
        self.batch_size, self.seed, self.shard, self.mask = batch_size, seed, shard, mask
        self.fixed, self.in_order = fixed, in_order
        self._epoch, self._rows, self._passes = -1, np.empty(0, np.int64), np.empty(0, np.int64)

    def write(self, slot: dict[str, Tensor], batch: int) -> None:
        """Write epoch and number of each image of a batch; for a stream, the filler writes them."""
        if self.mask:
            views, images, *grid = slot["where"].shape
            dealt = deal(self.mask, (views, images), math.prod(grid), seed=self.seed, batch=batch, rank=self.shard.rank)
            slot["counts"].copy_(dealt)
        if self.images is None:
            return
        whole = self.batch_size * self.shard.processes
        if self.in_order and self.fixed:
            first = batch * whole + self.shard.rank * self.batch_size
            self._write_places(slot, np.arange(first, first + self.batch_size) % (self.fixed * self.images))
            return
        epoch, place = divmod(batch, self.images // whole)
        if epoch != self._epoch:
            self._epoch = epoch
            self._rows, self._passes = epoch_order(self.images, self.mixture, self.seed, epoch, self.blocks)
        first = place * whole + self.shard.rank * self.batch_size
        drawn = slice(first, first + self.batch_size)
        # An image that is drawn twice in an epoch gets other views, by the number of its draw.
        rows, passes = torch.from_numpy(self._rows[drawn]), torch.from_numpy(self._passes[drawn])
        slot["keys"][:, 0] = passes
        slot["keys"][:, 1] = rows
        if self.fixed:  # the worker changes the number of an unreadable image in the keys
            slot["places"].copy_(passes % self.fixed * self.images + rows)

    def _write_places(self, slot: dict[str, Tensor], places: NDArray[np.int64]) -> None:
        assert self.images is not None
        slot["places"].copy_(torch.from_numpy(places))
        slot["keys"][:, 0] = slot["places"] // self.images
        slot["keys"][:, 1] = slot["places"] % self.images
