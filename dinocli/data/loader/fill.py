"""Worker side of the loader: from files to crops in a slot."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from dinocli.core.errors import DinoError
from dinocli.data.decode.image import decode, open_image, reduction
from dinocli.data.decode.pixels import BadImage, Data, Pixels
from dinocli.data.images import ImagesConfig
from dinocli.data.loader.cache import PixelCache
from dinocli.data.loader.ring import Task
from dinocli.data.sources.clips import Clips
from dinocli.data.sources.indexed import Images
from dinocli.data.sources.regular import why_unread
from dinocli.data.sources.shards import Sample
from dinocli.data.views.augment_bytes import ByteAugmenter, Changes, changes
from dinocli.data.views.compiled_bytes import CompiledByteAugmenter
from dinocli.data.views.crops import (
    Box,
    Floats,
    Tries,
    ViewsConfig,
    crop_boxes,
    crop_tries,
    cut_into,
    draws,
    partner_generator,
    resize_and_center,
    resize_for,
    uniforms,
)
from dinocli.data.views.masking import blocks, generator_of

_REDRAWS = 20
T = TypeVar("T")


class Cutter:
    """Cutter of views: decodes an image once and writes all its crops into a slot, at the slot's sizes.

    If the slot has room for clean crops, the boxes of the global views are cut a second time, into that size.

    Args:
        views: Views to cut from each image.
        seed: Seed of all views, mixed with epoch and index of the image.
        images: Decoding settings.
        finish: True to make the views from the crops too, in bytes. Else the device of the batch does.
        library: Path of the compiled operations that finish views. If None, numpy does.
    """

    def __init__(
        self, views: ViewsConfig, seed: int, images: ImagesConfig, *, finish: bool = False, library: str | None = None
    ) -> None:
        self.views, self.seed, self.images, self.finishes, self._library = views, seed, images, finish, library
        self._augmenters: dict[int, ByteAugmenter | CompiledByteAugmenter] = {}
        self.scale = np.array([v.scale for v in views.all])
        self.resamples: list[str] = [v.resample for v in views.all]

    def numbers(self, epoch: int, row: int) -> tuple[Floats, np.random.Generator]:
        return uniforms(self.seed, self._draw(epoch), row, len(self.scale))

    def partner(self, clips: Clips, epoch: int, row: int) -> int:
        """Return the frame from which the second global view of a frame's sample is cut."""
        return clips.other(row, partner_generator(self.seed, self._draw(epoch), row))

    def _draw(self, epoch: int) -> int:
        return epoch % self.views.fixed if self.views.fixed else epoch

    def tries(self, numbers: Floats) -> list[list[Tries]]:
        return crop_tries(numbers, self.scale)

    def pixels(self, data: Data, tries: list[Tries], places: list[Tensor]) -> tuple[Pixels, list[Box]] | BadImage:
        """Return the pixels, and the boxes of all views; a large photo is decoded smaller if that enlarges no crop."""
        opened = open_image(data, self.images)
        if isinstance(opened, BadImage):
            return opened
        boxes = _with_clean(crop_boxes(tries, opened.height, opened.width), places)
        reduce = 1
        if opened.height * opened.width > self.images.reduce_above * 1e6:
            room = (np.array(boxes)[:, 2:].min(1) / [place.shape[-1] for place in places]).min()
            reduce = reduction(room)
        pixels = opened.pixels(reduce)
        if isinstance(pixels, BadImage):
            return pixels
        if pixels.shape[:2] != (opened.height, opened.width):
            boxes = _place_on_grid(boxes, (opened.height, opened.width), pixels.shape[:2])
        return pixels, boxes

    def places(self, slot: dict[str, Tensor], task: Task) -> list[list[Tensor]]:
        """Return the output tensors for the crops of a chunk's images, each [1, C, H, W].

        There are V per image, and one more per global view if the slot has clean crops.
        """
        chunk = slice(task.first, task.first + task.images)
        names = [name for name in ("globals", "locals", "clean") if name in slot]
        groups = [slot[name][:, chunk].permute(1, 0, 4, 2, 3).unsqueeze(2) for name in names]
        return [[out for group in image for out in group.unbind()] for image in zip(*groups, strict=True)]

    def place(self, places: list[Tensor], pixels: Pixels, boxes: list[Box], resamples: list[str] | None = None) -> None:
        """Cut the boxes of an image into their places; `resamples` are those of its views. If None, of all views."""
        resamples = _with_clean(resamples or self.resamples, places)
        for out, box, resample in zip(places, boxes, resamples, strict=True):
            cut_into(out, pixels, box, resample)

    def cut_one(self, slot: dict[str, Tensor], task: Task, pixels: Pixels, number: int) -> None:
        """Cut all views of a decoded image; they depend on its number and not on the pass."""
        numbers, _ = self.numbers(0, number)
        [tries], [places] = self.tries(numbers[None]), self.places(slot, task)
        self.place(places, pixels, _with_clean(crop_boxes(tries, *pixels.shape[:2]), places))
        self.finish(slot, task.first, [view[0] for view in self.draw(slot, task.first, numbers[None])])

    def draw(self, slot: dict[str, Tensor], first: int, numbers: Floats) -> list[list[Changes]]:
        """Write the draws of a chunk's images; return the operations for `finish`, or nothing if the device has them.

        Returns:
            Operations on each view of each image, clean crops included. [V][B]
        """
        drawn = draws(numbers, self.views.all)
        for name, values in drawn._asdict().items():
            slot[name][:, first : first + len(numbers)] = values
        if not self.finishes:
            return []
        steps = changes(drawn, [view.shape[1] for name in ("globals", "locals") for view in slot[name]])
        return steps + [[one.flip_only() for one in view] for view in steps[: len(slot.get("clean", ()))]]

    def finish(self, slot: dict[str, Tensor], place: int, steps: list[Changes]) -> None:
        """Make the views of one image from its crops, right after the cut: then they are still in the cache."""
        if not steps:
            return
        crops = [view[place] for name in ("globals", "locals", "clean") if name in slot for view in slot[name]]
        for crop, one in zip(crops, steps, strict=False):
            self._augmenter(len(crop))(crop, one)

    def _augmenter(self, size: int) -> ByteAugmenter | CompiledByteAugmenter:
        if size not in self._augmenters:
            self._augmenters[size] = (
                CompiledByteAugmenter(self.views.channels, size, self._library)
                if self._library
                else ByteAugmenter(self.views.channels, size)
            )
        return self._augmenters[size]

    def mask(self, slot: dict[str, Tensor], first: int, keys: Sequence[Sequence[int]]) -> None:
        """Mask the number of patches that the slot states per global crop; `keys` are epoch and number per image."""
        if not self.views.mask:
            return
        where, counts = slot["where"].numpy(), slot["counts"].numpy()
        for b, (epoch, number) in enumerate(keys, first):
            for g, count in enumerate(counts[:, b].tolist()):
                where[g, b] = False
                if count:
                    generator = generator_of(self.seed, epoch, number, g)
                    where[g, b] = blocks(self.views.mask, where.shape[2:], count, generator)


def _with_clean(of_views: list[T], places: list[Tensor]) -> list[T]:
    """Repeat what belongs to the global views, which come first, for the clean crops among the places."""
    return of_views + of_views[: len(places) - len(of_views)]


def _place_on_grid(boxes: list[Box], full: tuple[int, int], small: tuple[int, ...]) -> list[Box]:
    """Scale the boxes of an image to its smaller decoding."""
    all_boxes, end = np.array(boxes), np.array(small[:2])
    ratio = end / full
    first = np.minimum(np.round(all_boxes[:, :2] * ratio).astype(np.int64), end - 1)
    last = np.clip(np.round((all_boxes[:, :2] + all_boxes[:, 2:]) * ratio).astype(np.int64), first + 1, end)
    return [(top, left, h, w) for top, left, h, w in np.concatenate([first, last - first], 1).tolist()]


class _Cuts(NamedTuple):
    """Views that are cut from one picture.

    Attributes:
        tries: Crop of each view.
        resamples: Interpolation of each view.
        places: Output of each view, then of the clean crops of the global views, if there are any.
    """

    tries: list[Tries]
    resamples: list[str]
    places: list[Tensor]

    def of(self, views: Sequence[int]) -> _Cuts:
        """Return some of the views with their clean crops."""
        count = len(self.tries)
        clean = [self.places[count + view] for view in views if count + view < len(self.places)]
        return _Cuts(
            [self.tries[view] for view in views],
            [self.resamples[view] for view in views],
            [self.places[view] for view in views] + clean,
        )


class ImageFiller:
    """Filler from a source with random access.

    Args:
        cutter: Cutter of the views.
        source: Images to read.
        cache: Cache of decoded images, if any.
        clips: Frames of videos. The second global view and its clean crop are cut from another frame of the clip, all
            others from the frame itself. If None, all views are cut from one image.
    """

    def __init__(
        self, cutter: Cutter, source: Images, cache: PixelCache | None = None, clips: Clips | None = None
    ) -> None:
        self.cutter, self.source, self.cache, self.clips = cutter, source, cache, clips

    def __call__(self, slot: dict[str, Tensor], task: Task) -> list[tuple[str, str]]:
        bad: list[tuple[str, str]] = []
        keys = slot["keys"][task.first : task.first + task.images]
        asked = keys.tolist()
        drawn = [self.cutter.numbers(epoch, row) for epoch, row in asked]
        numbers = np.stack([n for n, _ in drawn])
        tries, places = self.cutter.tries(numbers), self.cutter.places(slot, task)
        steps = self.cutter.draw(slot, task.first, numbers)
        for b, (epoch, row) in enumerate(asked):
            for redraw in range(_REDRAWS):
                if redraw:
                    peers = self.source.peers(row)
                    row = peers[int(drawn[b][1].integers(len(peers)))]
                    keys[b, 1] = row
                partner = self.cutter.partner(self.clips, epoch, row) if self.clips else row
                if partner == row:
                    found = self._fill(slot, task.first + b, row, tries[b], places[b])
                else:
                    found = self._fill_pair(slot, task.first + b, (row, partner), tries[b], places[b], bad)
                if not isinstance(found, BadImage):
                    self.cutter.finish(slot, task.first + b, [view[b] for view in steps])
                    break
                bad.append((self.source.names[row], found.reason))
            else:
                raise _nothing_to_read(*bad[-1])
        self.cutter.mask(slot, task.first, asked)
        return bad

    def _fill(
        self, slot: dict[str, Tensor], place: int, row: int, tries: list[Tries], places: list[Tensor]
    ) -> BadImage | None:
        return self._cut(row, _Cuts(tries, self.cutter.resamples, places))

    def _fill_pair(
        self,
        slot: dict[str, Tensor],
        place: int,
        rows: tuple[int, int],
        tries: list[Tries],
        places: list[Tensor],
        bad: list[tuple[str, str]],
    ) -> BadImage | None:
        """Cut the second global view from another frame, or from the first one if the other cannot be read."""
        row, partner = rows
        cuts = _Cuts(tries, self.cutter.resamples, places)
        second = cuts.of([1])
        if found := self._cut(row, cuts.of([view for view in range(len(tries)) if view != 1])):
            return found
        if unread := self._cut(partner, second):
            bad.append((self.source.names[partner], unread.reason))
            return self._cut(row, second)
        return None

    def _cut(self, row: int, cuts: _Cuts) -> BadImage | None:
        found = self._pixels(row, cuts.tries, cuts.places)
        if isinstance(found, BadImage):
            return found
        self.cutter.place(cuts.places, *found, cuts.resamples)
        return None

    def _pixels(self, row: int, tries: list[Tries], places: list[Tensor]) -> tuple[Pixels, list[Box]] | BadImage:
        if self.cache is None:
            data = _read(self.source, row, self.cutter.images)
            return data if isinstance(data, BadImage) else self.cutter.pixels(data, tries, places)
        pixels = self.cache.get(row)
        if pixels is None:
            data = _read(self.source, row, self.cutter.images)
            found = data if isinstance(data, BadImage) else decode(data, self.cutter.images)
            if isinstance(found, BadImage):
                return found
            pixels = self.cache.put(row, found)
        return pixels, _with_clean(crop_boxes(tries, *pixels.shape[:2]), places)


class FileFiller(ImageFiller):
    """Filler that leaves JPEGs to the device, if that gives the same pixels, and cuts the views of other images."""

    def _fill_pair(self, slot: dict[str, Tensor], place: int, *arguments: Any) -> BadImage | None:
        slot["lengths"][place] = 0  # frames of videos are decoded here
        return super()._fill_pair(slot, place, *arguments)

    def _fill(
        self, slot: dict[str, Tensor], place: int, row: int, tries: list[Tries], places: list[Tensor]
    ) -> BadImage | None:
        slot["lengths"][place] = 0
        if slot["refused"][0]:
            return super()._fill(slot, place, row, tries, places)
        data = _read(self.source, row, self.cutter.images)
        if not isinstance(data, bytes) or len(data) > slot["files"].shape[1]:
            return super()._fill(slot, place, row, tries, places)
        opened = open_image(data, self.cutter.images)
        if isinstance(opened, BadImage):
            return opened
        if not opened.for_device:
            return super()._fill(slot, place, row, tries, places)
        boxes = _with_clean(crop_boxes(tries, opened.height, opened.width), places)
        # By numpy, since torch takes no bytes without a copy of its own.
        slot["files"][place, : len(data)].numpy()[:] = np.frombuffer(data, np.uint8)
        slot["boxes"][place] = torch.tensor(boxes)
        slot["lengths"][place], slot["turns"][place] = len(data), opened.turn
        return None


class StreamFiller:
    """Filler from a stream, in the order of the stream."""

    def __init__(self, cutter: Cutter, stream: Iterator[Sample]) -> None:
        self.cutter, self.stream = cutter, stream
        self.ahead: deque[Sample] = deque()

    def __call__(self, slot: dict[str, Tensor], task: Task) -> list[tuple[str, str]]:
        bad: list[tuple[str, str]] = []
        drawn, asked = [], []
        places = self.cutter.places(slot, task)
        for b, place in enumerate(places, task.first):
            sample = self.ahead.popleft() if self.ahead else next(self.stream)
            asked.append((sample.epoch, sample.number))
            numbers, _ = self.cutter.numbers(sample.epoch, sample.number)
            [tries] = self.cutter.tries(numbers[None])
            found = self._pixels(sample, tries, place)
            # A later sample replaces a bad one and still keeps its own turn. So the stream stays in step with the
            # batches, and a resumed run finds its place.
            for further in range(_REDRAWS):
                if not isinstance(found, BadImage):
                    break
                bad.append((sample.name, found.reason))
                while len(self.ahead) <= further:
                    self.ahead.append(next(self.stream))
                sample = self.ahead[further]
                found = self._pixels(sample, tries, place)
            if isinstance(found, BadImage):
                raise _nothing_to_read(sample.name, found.reason)
            slot["keys"][b] = torch.tensor([sample.epoch, sample.number])
            self.cutter.place(place, *found)
            drawn.append(numbers)
        steps = self.cutter.draw(slot, task.first, np.stack(drawn))
        for b in range(len(drawn)):
            self.cutter.finish(slot, task.first + b, [view[b] for view in steps])
        self.cutter.mask(slot, task.first, asked)
        return bad

    def _pixels(self, sample: Sample, tries: list[Tries], places: list[Tensor]) -> tuple[Pixels, list[Box]] | BadImage:
        return BadImage(sample.reason) if sample.reason else self.cutter.pixels(sample.data, tries, places)


def _read(source: Images, row: int, images: ImagesConfig) -> Data | BadImage:
    try:
        return source.read(row, images)
    except OSError as error:
        return BadImage(why_unread(error))


def _nothing_to_read(name: str, reason: str) -> DinoError:
    return DinoError(
        f"{_REDRAWS} images in a row cannot be read; the last is {name}: {reason}",
        "check that file, and that the source holds images",
    )


class Seen(NamedTuple):
    """Report of a worker on an image: its place in the batch, name, label, and the reason if it is skipped."""

    place: int
    name: str
    label: int
    reason: str


class PlainFiller:
    """Filler with the evaluation view of each image and, given a cutter, with the views of a recipe.

    Args:
        source: Images, or a stream of them.
        size: Side of the evaluation view, in pixels.
        images: Decoding settings.
        before: Function that counts the stream's images before a chunk, from its batch and first image.
        cutter: Cutter of the additional views.
    """

    def __init__(
        self,
        source: Iterator[Sample] | Images,
        size: int,
        images: ImagesConfig,
        before: Callable[[int, int], int] = lambda batch, first: 0,
        cutter: Cutter | None = None,
    ) -> None:
        self.source, self.size, self.images, self.before, self.cutter = source, size, images, before, cutter
        self._taken = 0

    def _skip(self, task: Task) -> None:
        """Skip the images that other processes fill."""
        if not isinstance(self.source, Images):
            passed = max(0, self.before(task.batch, task.first) - self._taken)
            self._taken += passed + task.images
            next(islice(self.source, passed, passed), None)

    def __call__(self, slot: dict[str, Tensor], task: Task) -> list[Seen]:
        seen = []
        self._skip(task)
        for b in range(task.first, task.first + task.images):
            if isinstance(self.source, Images):
                row = task.batch * len(slot["images"]) + b
                if row >= len(self.source):
                    break
                number, name, label = row, self.source.names[row], int(self.source.labels[row])
                data: Data | BadImage = _read(self.source, row, self.images)
            else:
                sample = next(self.source, None)
                if sample is None:
                    break
                number, name, label = sample.number, sample.name, sample.label
                data = BadImage(sample.reason) if sample.reason else sample.data
            pixels = data if isinstance(data, BadImage) else decode(data, self.images)
            if isinstance(pixels, BadImage):
                seen.append(Seen(b, name, label, pixels.reason))
                continue
            slot["images"][b] = resize_and_center(pixels, resize_for(self.size), self.size)
            if self.cutter:
                self.cutter.cut_one(slot, task._replace(first=b, images=1), pixels, number)
            seen.append(Seen(b, name, label, ""))
        return seen
