"""Inspection: statistics of a source's images, from a random sample."""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dinocli.apps.doctor.near_duplicates import SIDE, Pair, is_flat, near_equal, thumbnail
from dinocli.core.resources import cores
from dinocli.data.decode.contrast import Contrast, contrast, raw_range
from dinocli.data.decode.image import open_image, reduction
from dinocli.data.decode.pixels import BadImage, Data
from dinocli.data.decode.torch_codecs import has_fast_jpeg
from dinocli.data.images import DEFAULTS, ImagesConfig, Range
from dinocli.data.sources.indexed import Images
from dinocli.data.sources.open import PackedImages, Source, TorchvisionImages
from dinocli.data.sources.regular import why_unread
from dinocli.data.sources.shards import Shards

Read = Callable[[], "Data | BadImage"]

_SECONDS = 45.0  # time limit of the sampling
_PIPES, _SHARDS = 4, 50  # number of pipes and shards that the sample comes from
_MEASURED = 64  # largest number of low-contrast images whose raw values are measured, which decodes each a few times
_ENOUGH = 250_000  # pixels; larger JPEGs are decoded smaller if the decoder can


@dataclass(frozen=True)
class Spread:
    """Quantiles of a number: minimum, 5 %, median, 95 % and maximum."""

    least: float
    low: float
    median: float
    high: float
    most: float


@dataclass(frozen=True)
class Inspection:
    """Statistics of a source's images.

    Attributes:
        where: Source as the user named it.
        kind: `files`, `shards`, or `decoded` for images without files.
        count: Total number of images, or None if unknown for a pipe.
        classes: Number of classes, by folders, list or index; 0 for unlabelled images.
        drawn: Number of sampled images.
        read: Number of readable sampled images.
        formats: Number of readable images per format.
        width: Width in pixels.
        height: Height in pixels.
        short: Shorter side in pixels.
        aspect: Ratio of long side to short side.
        megabytes: Mean size of the decoded pixels.
        deep: Number of images with more than 8 bits.
        gray: Number of images without colors, including deep ones.
        flat: Number of images of one color.
        bad: Name and reason of each unreadable image.
        copies: Number of images that equal an earlier one byte for byte.
        near: Number of near-duplicates of an earlier image, excluding copies.
        pairs: Most similar pairs of near-duplicates.
        mean: Mean per channel, 0 to 1, with equal weight per image. C numbers.
        std: Standard deviation per channel.
        milliseconds: Median time to read and decode an image.
        seconds: Duration of the inspection.
        single: Number of images whose pixels are all equal.
        several: Number of images with several pages or frames; only the first is read.
        narrow: Number of images that span less than a quarter of the 256 levels, without a measured window.
        window: Raw value range if most deep images are narrow, else None. All other statistics except `narrow` use it.
    """

    where: str
    kind: str
    count: int | None
    classes: int
    drawn: int
    read: int
    formats: dict[str, int]
    width: Spread
    height: Spread
    short: Spread
    aspect: Spread
    megabytes: float
    deep: int
    gray: int
    flat: int
    bad: dict[str, str]
    copies: int
    near: int
    pairs: list[Pair]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    milliseconds: float
    seconds: float
    single: int = 0
    several: int = 0
    narrow: int = 0
    window: Range | None = None

    @property
    def whole(self) -> bool:
        """True if the sample contains every image."""
        return self.drawn == self.count


class _Sample(NamedTuple):
    """Statistics of one image, or the reason why it is unreadable."""

    name: str
    reason: str = ""
    format: str = ""
    deep: bool = False
    width: int = 0
    height: int = 0
    mean: NDArray[np.float64] = np.zeros(3)
    square: NDArray[np.float64] = np.zeros(3)
    thumb: NDArray[np.float32] = np.zeros((SIDE, SIDE, 3), np.float32)
    digest: bytes = b""
    seconds: float = 0.0
    contrast: Contrast | None = None
    pages: int = 1


def inspect(
    source: Source,
    *,
    images: ImagesConfig = DEFAULTS,
    sample: int = 2000,
    seed: int = 0,
    seconds: float = _SECONDS,
    report: Callable[[int], None] = lambda images: None,
) -> Inspection:
    """Decode a sample of a source and compute statistics; small sources are read completely.

    Args:
        source: Images to inspect.
        images: Settings and limits of image decoding.
        sample: Number of images to draw.
        seed: Seed of the sample of images.
        seconds: Time limit of the sampling.
        report: Progress callback with the number of images processed.
    """
    start = time.monotonic()
    samples, narrow = _read_sample(source, images, sample, seed, seconds, report)
    good = [one for one in samples if not one.reason]
    window = None if images.window else _choose_window(good, [read for _, read in narrow], images, seconds)
    if window:
        inspection = inspect(
            source,
            images=images.model_copy(update={"window": window}),
            sample=sample,
            seed=seed,
            seconds=seconds,
            report=report,
        )
        return replace(inspection, narrow=_count_narrow(good), window=window, seconds=time.monotonic() - start)
    kind = "shards" if isinstance(source, Shards) else "files"
    if isinstance(source, TorchvisionImages | PackedImages):
        kind = "decoded"
    distinct = {one.digest: one for one in reversed(good)}
    near, pairs = near_equal([one.name for one in distinct.values()], [one.thumb for one in distinct.values()])
    square, mean = (
        np.mean([value for value in values] or [np.zeros(images.channels)], axis=0)
        for values in ([one.square for one in good], [one.mean for one in good])
    )
    return Inspection(
        where=source.where,
        kind=kind,
        count=source.count,
        classes=len(source.classes),
        drawn=len(samples),
        read=len(good),
        formats=dict(Counter(one.format for one in good).most_common()),
        width=_compute_spread([one.width for one in good]),
        height=_compute_spread([one.height for one in good]),
        short=_compute_spread([min(one.width, one.height) for one in good]),
        aspect=_compute_spread([max(one.width, one.height) / min(one.width, one.height) for one in good]),
        megabytes=float(np.mean([1e-6 * images.channels * one.width * one.height for one in good] or [0.0])),
        deep=sum(one.deep for one in good),
        # The three channels of a grayscale JPEG are equal up to rounding.
        gray=sum(bool(np.ptp(one.thumb, axis=2).max() < 3) for one in good),
        flat=sum(is_flat(one.thumb) for one in good),
        bad={one.name: one.reason for one in samples if one.reason},
        copies=len(good) - len(distinct),
        near=near,
        pairs=pairs,
        mean=tuple(mean.tolist()),
        std=tuple(np.sqrt(np.maximum(square - mean**2, 0)).tolist()),
        milliseconds=1000 * float(np.median([one.seconds for one in good] or [0.0])),
        seconds=time.monotonic() - start,
        single=_count_single(good),
        several=sum(one.pages > 1 for one in good),
        narrow=_count_narrow(good),
    )


def warn_of(source: Source, images: ImagesConfig, *, sample: int = 64, seconds: float = 2.0) -> list[str]:
    """Check a few images before a long run for content that is lost without an error.

    Args:
        source: Images of the run.
        images: Limits and window of the run.
        sample: Number of images to draw.
        seconds: Time limit of the sampling.

    Returns:
        One warning for images of a single color, with the window that fixes them, and one for pages that are not read.
    """
    samples, narrow = _read_sample(source, images, sample, 0, seconds, lambda done: None)
    good = [one for one in samples if not one.reason]
    total = f"{len(good)} {'images' if len(samples) == source.count else 'sampled images'}"
    single = _count_single(good)
    faint = [one for one in good if one.contrast and one.contrast.faint and not one.contrast.single]
    nearly = sum(one.deep for one in faint)  # images of 8 bits and low contrast have lost nothing
    lines = []
    if lost := single + nearly:
        window = _measure_window([read for one, read in narrow if one.contrast and one.contrast.faint], images, seconds)
        appearance = "a single color or nearly so" if nearly else "a single color"
        line = f"{lost} of {total} {'is' if lost == 1 else 'are'} {appearance} after conversion to 8 bits"
        if window:
            line += f"; raw values span {window[0]:g} to {window[1]:g}: --set images.window='{window_text(window)}'"
        lines.append(line)
    if multipage := sum(one.pages > 1 for one in good):
        have = "has" if multipage == 1 else "have"
        read = "only the first is read (see images.pages)"
        lines.append(f"{multipage} of {total} {have} several pages or frames; {read}")
    return lines


def window_text(window: Range) -> str:
    """Return a window as typed after `images.window=`."""
    return f"[{window[0]:.10g}, {window[1]:.10g}]"


def _read_sample(
    source: Source, images: ImagesConfig, sample: int, seed: int, seconds: float, report: Callable[[int], None]
) -> tuple[list[_Sample], list[tuple[_Sample, Read]]]:
    """Read a sample of images; return their statistics, and the readers of the first deep images of low contrast."""
    has_fast_jpeg()  # loads torch once, so that no image's time includes it
    samples, narrow, start = list[_Sample](), list[tuple[_Sample, Read]](), time.monotonic()
    threads = min(16, cores())
    draw = islice(_draw(source, images, sample, seed), sample)
    with ThreadPoolExecutor(threads) as pool:  # Pillow decodes without holding the interpreter lock
        while time.monotonic() - start < seconds and (block := list(islice(draw, 4 * threads))):
            measured = list(pool.map(partial(_measure, images), *zip(*block, strict=True)))
            samples += measured
            for sampled, (_, read) in zip(measured, block, strict=True):
                if sampled.deep and sampled.contrast and sampled.contrast.narrow and len(narrow) < _MEASURED:
                    narrow.append((sampled, read))
            report(len(samples))
    return samples, narrow


def _measure_window(reads: list[Read], images: ImagesConfig, seconds: float) -> Range | None:
    """Measure the raw value range of as many images as time allows; None if all have 8 bits or a single value each."""

    def measure(read: Read) -> Range | None:
        try:
            data = read()
        except OSError:  # the file was removed meanwhile
            return None
        return None if isinstance(data, BadImage) else raw_range(data, images)

    ranges, start, threads = list[Range | None](), time.monotonic(), min(16, cores())
    with ThreadPoolExecutor(threads) as pool:
        while len(ranges) < len(reads) and (not ranges or time.monotonic() - start < seconds):
            ranges += pool.map(measure, reads[len(ranges) : len(ranges) + threads])
    deep = [found for found in ranges if found]
    return (min(low for low, _ in deep), max(high for _, high in deep)) if deep else None


def _choose_window(good: list[_Sample], reads: list[Read], images: ImagesConfig, seconds: float) -> Range | None:
    """Return the window of raw values if most deep images are narrow and it would not clip the others."""
    deep = [one for one in good if one.deep]  # a window does not change images of 8 bits
    levels = [(one.contrast.low, one.contrast.high) for one in deep if one.contrast]
    if _count_narrow(deep) <= len(deep) / 2 or max(high for _, high in levels) - min(low for low, _ in levels) >= 128:
        return None
    return _measure_window(reads, images, seconds)


def _count_single(good: list[_Sample]) -> int:
    return sum(one.contrast is not None and one.contrast.single for one in good)


def _count_narrow(good: list[_Sample]) -> int:
    return sum(one.contrast is not None and one.contrast.narrow for one in good)


def _draw(source: Source, images: ImagesConfig, sample: int, seed: int) -> Iterator[tuple[str, Read]]:
    """Yield names and readers of images in random order; for shards, a few images of some shards."""
    generator = np.random.default_rng(seed)
    if isinstance(source, Images):
        for row in generator.permutation(len(source))[:sample].tolist():
            yield source.names[row], partial(source.read, row, images)
        return
    counts = source.counts or [sample] * len(source.urls)
    order = [shard for shard in generator.permutation(len(counts)).tolist() if counts[shard]]
    if sum(counts) > sample:
        order = order[: min(_SHARDS, max(_PIPES, sample // 16)) if source.counts else _PIPES]
    per_shard = sample if sum(counts) <= sample else math.ceil(sample / len(order))
    for shard in order:
        single = replace(source, urls=[source.urls[shard]], counts=[counts[shard]] if source.counts else None)
        # A pipe has no headers to skip by, so its first images are used: a random draw would read all of it.
        shuffle = {"seed": seed, "buffer": counts[shard]} if source.counts else {}
        stream = single.stream(0, 1, max_megabytes=images.max_megabytes, **shuffle)
        for item in islice(stream, min(per_shard, counts[shard])):
            yield item.name, partial(_return, BadImage(item.reason) if item.reason else item.data)


def _return(data: bytes | BadImage) -> bytes | BadImage:
    return data


def _measure(images: ImagesConfig, name: str, read: Read) -> _Sample:
    start = time.perf_counter()
    try:
        data = read()
    except OSError as error:
        return _Sample(name, why_unread(error))
    opened = data if isinstance(data, BadImage) else open_image(data, images)
    if isinstance(opened, BadImage):
        return _Sample(name, opened.reason)
    area = opened.width * opened.height
    pixels = opened.pixels(reduction(math.sqrt(area / _ENOUGH)))
    if isinstance(pixels, BadImage):
        return _Sample(name, pixels.reason)
    seconds = time.perf_counter() - start
    step = max(1, math.isqrt(pixels.shape[0] * pixels.shape[1] // _ENOUGH))
    values = pixels[::step, ::step].reshape(-1, pixels.shape[2]) / 255
    return _Sample(
        name,
        format=opened.format or "decoded",
        deep=opened.deep,
        width=opened.width,
        height=opened.height,
        mean=values.mean(axis=0),
        square=(values**2).mean(axis=0),
        thumb=thumbnail(pixels),
        digest=hashlib.blake2b(data if isinstance(data, bytes) else pixels.tobytes(), digest_size=16).digest(),
        seconds=seconds,
        contrast=contrast(pixels),
        pages=getattr(opened, "pages", 1),
    )


def _compute_spread(values: list[int] | list[float]) -> Spread:
    return Spread(*np.quantile(values or [0.0], [0, 0.05, 0.5, 0.95, 1]).tolist())
