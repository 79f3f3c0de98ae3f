"""Loader: endless batches of views for training, and one pass of plain images for everything else."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import Field, PositiveFloat
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dinocli.config import Config
from dinocli.data.augment import augment, normalize
from dinocli.data.crops import BOX, NUMBERS, Draws, ViewConfig, crop_boxes, cut, draws, resize_and_center, uniforms
from dinocli.data.decode import BadImage, decode
from dinocli.data.sources import ImageFolder
from dinocli.errors import DinoError

_REDRAWS = 20
BAD_SHARE = 0.05
_WAITING_BYTES = 8 * 2**30


class ViewsConfig(Config):
    """The views of an image.

    Attributes:
        mean: Of the three channels, in 0 to 1.
        std: Of the three channels.
        global_1: The first global view.
        global_2: The second; a loss between views wants it, a classifier does not.
        local: The local views, all alike; absent, there are none.
        locals: How many local views.
    """

    mean: tuple[float, float, float]
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat]
    global_1: ViewConfig
    global_2: ViewConfig | None = None
    local: ViewConfig | None = None
    locals: int = Field(0, ge=0)

    @property
    def globals(self) -> list[ViewConfig]:
        """The global views in order."""
        return [view for view in (self.global_1, self.global_2) if view]

    @property
    def all(self) -> list[ViewConfig]:
        """All views in order, global ones first."""
        return self.globals + ([self.local] * self.locals if self.local else [])


@dataclass(frozen=True)
class Batch:
    """Views of B images, ready for the networks.

    Attributes:
        global_crops: [G, B, C, H, W]
        local_crops: [V-G, B, C, h, w]; absent where there are no local views.
        rows: Index of each image in its source. [B], on the host
    """

    global_crops: Tensor
    local_crops: Tensor | None
    rows: Tensor

    @property
    def crops(self) -> list[Tensor]:
        """All views, a group a resolution, global ones first."""
        return [self.global_crops] if self.local_crops is None else [self.global_crops, self.local_crops]


class _Slab(NamedTuple):
    """What a worker sends: crops as uint8, their draws (none if no image was found), the files it could not read."""

    global_crops: Tensor
    local_crops: Tensor
    rows: Tensor
    draws: Draws | None
    bad: list[tuple[str, str]]


@dataclass
class BadFiles:
    """Files that could not be read, with the reason; a file counts once however often it is drawn."""

    reasons: dict[str, str] = field(default_factory=dict)

    def summary(self) -> str:
        """Counts by reason in one line, the most frequent first."""
        counts = Counter(reason.split(":")[0] for reason in self.reasons.values()).most_common(4)
        return ", ".join(f"{count} {reason}" for reason, count in counts)


class _Order(Sampler[list[tuple[int, int]]]):
    """Endless batches of (epoch, index): each image once an epoch, in the epoch's own order; the rest is dropped."""

    def __init__(self, images: int, batch_size: int, seed: int, start: int) -> None:
        self.images, self.batch_size, self.seed, self.start = images, batch_size, seed, start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        batches = self.images // self.batch_size
        epoch, first = divmod(self.start, batches)
        while True:
            order = np.random.default_rng((self.seed, epoch)).permutation(self.images)
            for b in range(first, batches):
                yield [(epoch, int(i)) for i in order[b * self.batch_size : (b + 1) * self.batch_size]]
            epoch, first = epoch + 1, 0


class _Cutter(Dataset[_Slab]):
    """Worker: decodes each image of a batch once and cuts all its crops."""

    def __init__(self, source: ImageFolder, views: ViewsConfig, seed: int) -> None:
        self.source, self.views, self.seed = source, views, seed
        self.scale = np.array([v.scale for v in views.all])

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> _Slab:
        views, bad = self.views, []
        groups = [views.globals, views.all[len(views.globals) :]]
        slabs = [torch.empty((len(g), len(keys), 3, *[g[0].size if g else 0] * 2), dtype=torch.uint8) for g in groups]
        places = [(slab[v], view) for slab, group in zip(slabs, groups, strict=True) for v, view in enumerate(group)]
        numbers = np.empty((len(keys), len(places), NUMBERS))
        rows = torch.empty(len(keys), dtype=torch.long)
        for b, (epoch, index) in enumerate(keys):
            numbers[b], generator = uniforms(self.seed, epoch, index, len(places))
            pixels = decode(self.source.read(index))
            for _ in range(_REDRAWS):
                if not isinstance(pixels, BadImage):
                    break
                bad.append((self.source.paths[index], pixels.reason))
                index = int(generator.integers(len(self.source)))
                pixels = decode(self.source.read(index))
            if isinstance(pixels, BadImage):
                return _Slab(slabs[0], slabs[1], rows, None, bad)
            rows[b] = index
            boxes = crop_boxes(numbers[b, :, :BOX], pixels.shape[0], pixels.shape[1], self.scale)
            for (slab, view), box in zip(places, boxes, strict=True):
                slab[b] = cut(pixels, box, (view.size, view.size), view.resample)
        return _Slab(slabs[0], slabs[1], rows, draws(numbers, views.all), bad)


def train_batches(
    source: ImageFolder,
    views: ViewsConfig,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    workers: int = 0,
    device: torch.device,
    bad: BadFiles,
) -> Iterator[Batch]:
    """Endless batches in an order and with views that depend on the seed alone.

    A file that cannot be read is replaced by another draw, so that batches keep their size.

    Args:
        source: The images.
        views: The views to make.
        batch_size: B.
        seed: Of the order and of all views.
        start: Batches to pass over, for a run that goes on.
        workers: Processes that decode and crop; 0 does it in this one.
        device: Where color and blur are done, and where the batches lie.
        bad: Takes up the files that could not be read.

    Raises:
        DinoError: More than 5 % of the images cannot be read.
    """
    # Batches that wait lie in shared memory: a few of them, and never more than the budget.
    batch_bytes = batch_size * sum(3 * view.size**2 for view in views.all)
    workers = min(workers, max(1, _WAITING_BYTES // (2 * batch_bytes)))
    prefetch = max(2, min(4, _WAITING_BYTES // (max(1, workers) * batch_bytes)))
    loader: DataLoader[Any] = DataLoader(
        _Cutter(source, views, seed),
        batch_sampler=_Order(len(source), batch_size, seed, start),
        collate_fn=_as_is,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        prefetch_factor=prefetch if workers else None,
        worker_init_fn=_leave_signals_to_parent,
    )
    mean, std = torch.tensor(views.mean, device=device), torch.tensor(views.std, device=device)
    n = len(views.globals)
    for slab in _received(loader):
        bad.reasons.update(slab.bad)
        if slab.draws is None or len(bad.reasons) > max(1, BAD_SHARE * len(source)):
            raise DinoError(
                f"{len(bad.reasons)} of {len(source)} images cannot be read ({bad.summary()}); "
                f"up to {BAD_SHARE:.0%} are passed over",
                f"mend them or take them out of the folder; one is {source.root / next(iter(bad.reasons))}",
            )
        groups = [
            augment(crops.to(device, non_blocking=True), Draws(*(d[part] for d in slab.draws)), mean, std)
            for crops, part in ((slab.global_crops, slice(0, n)), (slab.local_crops, slice(n, None)))
            if len(crops)
        ]
        yield Batch(groups[0], groups[1] if len(groups) > 1 else None, slab.rows)


def _received(loader: DataLoader[Any]) -> Iterator[Any]:
    """What the workers send; one that was killed, mostly for want of memory, becomes an error that can be read."""
    try:
        yield from loader
    except RuntimeError as error:
        if "worker" not in str(error):
            raise
        raise DinoError(
            "a process that decodes images was killed, mostly for want of memory",
            "--workers 1, or a smaller --batch-size",
        ) from error


def _leave_signals_to_parent(worker: int) -> None:
    # Ctrl-C, and what `timeout` and schedulers send, reach every process of the group; the parent finishes its step and
    # then ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _as_is(slab: Any) -> Any:
    return slab


class Plain(NamedTuple):
    """Images of one pass in order.

    Attributes:
        images: Normalized. [B, 3, size, size]
        rows: Index of each in its source. [B]
        bad: Index and reason of those that could not be read and are left out.
    """

    images: Tensor
    rows: list[int]
    bad: list[tuple[int, str]]


class _Reader(Dataset[Any]):
    def __init__(self, source: ImageFolder, size: int) -> None:
        self.source, self.size = source, size

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, rows: Sequence[int]) -> tuple[Tensor, list[int], list[tuple[int, str]]]:
        read = [(row, decode(self.source.read(row))) for row in rows]
        good = [(row, pixels) for row, pixels in read if not isinstance(pixels, BadImage)]
        bad = [(row, pixels.reason) for row, pixels in read if isinstance(pixels, BadImage)]
        images = [resize_and_center(pixels, resize_for(self.size), self.size) for _, pixels in good]
        stacked = torch.stack(images) if images else torch.empty((0, 3, self.size, self.size), dtype=torch.uint8)
        return stacked, [row for row, _ in good], bad


def resize_for(size: int) -> int:
    """The short side to resize to before a crop of `size` is taken: 256 for 224, and in that proportion for others."""
    return round(size * 256 / 224)


def plain_batches(
    source: ImageFolder,
    *,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int,
    workers: int,
    device: torch.device,
) -> Iterator[Plain]:
    """All images once, in order, as the evaluation sees them: resized, cropped in the middle, normalized."""
    loader: DataLoader[Any] = DataLoader(
        _Reader(source, size),
        batch_size=batch_size,
        collate_fn=_as_is,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=_leave_signals_to_parent,
    )
    m, s = torch.tensor(mean, device=device), torch.tensor(std, device=device)
    for images, rows, bad in _received(loader):
        yield Plain(normalize(images.to(device, non_blocking=True).float() / 255, m, s), rows, bad)
