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
from PIL import Image

from dinocli.apps.doctor.near_duplicates import SIDE, Pair, is_flat, near_equal, thumbnail
from dinocli.core.resources import cores
from dinocli.data.decode.contrast import Contrast, contrast, raw_range
from dinocli.data.decode.image import open_image, reduction
from dinocli.data.decode.pixels import BadImage
from dinocli.data.decode.torch_codecs import has_fast_jpeg
from dinocli.data.images import DEFAULTS, ImagesConfig, Range
from dinocli.data.sources.open import Images, Source, TorchvisionImages
from dinocli.data.sources.regular import why_unread
from dinocli.data.sources.shards import Shards

Read = Callable[[], "bytes | Image.Image | BadImage"]

_SECONDS = 45.0  # time limit of the sampling
_PIPES, _SHARDS = 4, 50  # number of pipes and shards that the sample comes from
_MEASURED = 64  # low-contrast images whose raw values are measured, by decoding them a few times
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
        narrow: Number of images that span less than a quarter of the levels, before a window is measured.
        window: Raw value range if most deep images are narrow, else None; mean, std and the rest then use it.
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


class _Look(NamedTuple):
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
        seed: Seed of the draw.
        seconds: Time limit of the sampling.
        report: Progress callback with the number of images processed.
    """
    start = time.monotonic()
    looks, narrow = _looks(source, images, sample, seed, seconds, report)
    good = [look for look in looks if not look.reason]
    window = None if images.window else _window(good, [read for _, read in narrow], images, seconds)
    if window:
        seen = inspect(
            source,
            images=images.model_copy(update={"window": window}),
            sample=sample,
            seed=seed,
            seconds=seconds,
            report=report,
        )
        return replace(seen, narrow=_narrow(good), window=window, seconds=time.monotonic() - start)
    kind = "shards" if isinstance(source, Shards) else "files"
    if isinstance(source, TorchvisionImages):
        kind = "decoded"
    first = {look.digest: look for look in reversed(good)}
    near, pairs = near_equal([look.name for look in first.values()], [look.thumb for look in first.values()])
    square, mean = (
        np.mean([value for value in values] or [np.zeros(images.channels)], axis=0)
        for values in ([look.square for look in good], [look.mean for look in good])
    )
    return Inspection(
        where=source.where,
        kind=kind,
        count=source.count,
        classes=len(source.classes),
        drawn=len(looks),
        read=len(good),
        formats=dict(Counter(look.format for look in good).most_common()),
        width=_spread([look.width for look in good]),
        height=_spread([look.height for look in good]),
        short=_spread([min(look.width, look.height) for look in good]),
        aspect=_spread([max(look.width, look.height) / min(look.width, look.height) for look in good]),
        megabytes=float(np.mean([1e-6 * images.channels * look.width * look.height for look in good] or [0.0])),
        deep=sum(look.deep for look in good),
        # A grayscale JPEG in three channels has them equal up to rounding.
        gray=sum(bool(np.ptp(look.thumb, axis=2).max() < 3) for look in good),
        flat=sum(is_flat(look.thumb) for look in good),
        bad={look.name: look.reason for look in looks if look.reason},
        copies=len(good) - len(first),
        near=near,
        pairs=pairs,
        mean=tuple(mean.tolist()),
        std=tuple(np.sqrt(np.maximum(square - mean**2, 0)).tolist()),
        milliseconds=1000 * float(np.median([look.seconds for look in good] or [0.0])),
        seconds=time.monotonic() - start,
        single=_single(good),
        several=sum(look.pages > 1 for look in good),
        narrow=_narrow(good),
    )


def warn_of(source: Source, images: ImagesConfig, *, sample: int = 64, seconds: float = 2.0) -> list[str]:
    """Check a few images of a source before a long run for information that is lost without an error.

    Args:
        source: Images of the run.
        images: Limits and window of the run.
        sample: Number of images to draw.
        seconds: Time limit of the sampling.

    Returns:
        One line for single-color images, with the window that fixes them, and one for unread pages.
    """
    looks, narrow = _looks(source, images, sample, 0, seconds, lambda done: None)
    good = [look for look in looks if not look.reason]
    which = f"{len(good)} {'images' if len(looks) == source.count else 'sampled images'}"
    single = _single(good)
    faint = [look for look in good if look.contrast and look.contrast.faint and not look.contrast.single]
    nearly = sum(look.deep for look in faint)  # 8 bits of low contrast have lost nothing
    lines = []
    if lost := single + nearly:
        window = _raw_window([read for look, read in narrow if look.contrast and look.contrast.faint], images, seconds)
        what = "a single color or nearly so" if nearly else "a single color"
        line = f"{lost} of {which} {'is' if lost == 1 else 'are'} {what} after conversion to 8 bits"
        if window:
            line += f"; raw values span {window[0]:g} to {window[1]:g}: --set images.window='{window_text(window)}'"
        lines.append(line)
    if several := sum(look.pages > 1 for look in good):
        have = "has" if several == 1 else "have"
        lines.append(f"{several} of {which} {have} several pages or frames; only the first is read")
    return lines


def window_text(window: Range) -> str:
    """Return a window as typed after `images.window=`."""
    return f"[{window[0]:.10g}, {window[1]:.10g}]"


def _looks(
    source: Source, images: ImagesConfig, sample: int, seed: int, seconds: float, report: Callable[[int], None]
) -> tuple[list[_Look], list[tuple[_Look, Read]]]:
    """Read some images of a source; return their statistics, and the first deep narrow ones with their readers."""
    has_fast_jpeg()  # loads torch once, so that no image's time includes it
    looks, narrow, start = list[_Look](), list[tuple[_Look, Read]](), time.monotonic()
    threads = min(16, cores())
    draw = islice(_draw(source, images, sample, seed), sample)
    with ThreadPoolExecutor(threads) as pool:  # Pillow decodes without holding the interpreter lock
        while time.monotonic() - start < seconds and (some := list(islice(draw, 4 * threads))):
            found = list(pool.map(partial(_look, images), *zip(*some, strict=True)))
            looks += found
            for look, (_, read) in zip(found, some, strict=True):
                if look.deep and look.contrast and look.contrast.narrow and len(narrow) < _MEASURED:
                    narrow.append((look, read))
            report(len(looks))
    return looks, narrow


def _raw_window(reads: list[Read], images: ImagesConfig, seconds: float) -> Range | None:
    """Measure the raw value range of as many images as time allows; None if all have 8 bits or a single value each."""

    def measure(read: Read) -> Range | None:
        try:
            data = read()
        except OSError:  # the file was removed meanwhile
            return None
        return None if isinstance(data, BadImage) else raw_range(data, images)

    found, start, threads = list[Range | None](), time.monotonic(), min(16, cores())
    with ThreadPoolExecutor(threads) as pool:
        while len(found) < len(reads) and (not found or time.monotonic() - start < seconds):
            found += pool.map(measure, reads[len(found) : len(found) + threads])
    deep = [each for each in found if each]
    return (min(low for low, _ in deep), max(high for _, high in deep)) if deep else None


def _window(good: list[_Look], reads: list[Read], images: ImagesConfig, seconds: float) -> Range | None:
    """Return the window that most deep images need, unless it would clip the others."""
    deep = [look for look in good if look.deep]  # a window does not change images of 8 bits
    levels = [(look.contrast.low, look.contrast.high) for look in deep if look.contrast]
    if _narrow(deep) <= len(deep) / 2 or max(high for _, high in levels) - min(low for low, _ in levels) >= 128:
        return None
    return _raw_window(reads, images, seconds)


def _single(good: list[_Look]) -> int:
    return sum(look.contrast is not None and look.contrast.single for look in good)


def _narrow(good: list[_Look]) -> int:
    return sum(look.contrast is not None and look.contrast.narrow for look in good)


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
    share = sample if sum(counts) <= sample else math.ceil(sample / len(order))
    for shard in order:
        one = replace(source, urls=[source.urls[shard]], counts=[counts[shard]] if source.counts else None)
        # Pipes cannot return headers alone, so their first images are taken: a random draw would load everything.
        order_of = {"seed": seed, "buffer": counts[shard]} if source.counts else {}
        stream = one.stream(0, 1, max_megabytes=images.max_megabytes, **order_of)
        for found in islice(stream, min(share, counts[shard])):
            yield found.name, partial(_return, BadImage(found.reason) if found.reason else found.data)


def _return(data: bytes | BadImage) -> bytes | BadImage:
    return data


def _look(images: ImagesConfig, name: str, read: Read) -> _Look:
    start = time.perf_counter()
    try:
        data = read()
    except OSError as error:
        return _Look(name, why_unread(error))
    opened = data if isinstance(data, BadImage) else open_image(data, images)
    if isinstance(opened, BadImage):
        return _Look(name, opened.reason)
    area = opened.width * opened.height
    pixels = opened.pixels(reduction(math.sqrt(area / _ENOUGH)))
    if isinstance(pixels, BadImage):
        return _Look(name, pixels.reason)
    seconds = time.perf_counter() - start
    step = max(1, math.isqrt(pixels.shape[0] * pixels.shape[1] // _ENOUGH))
    some = pixels[::step, ::step].reshape(-1, pixels.shape[2]) / 255
    return _Look(
        name,
        format=opened.format or "decoded",
        deep=opened.deep,
        width=opened.width,
        height=opened.height,
        mean=some.mean(axis=0),
        square=(some**2).mean(axis=0),
        thumb=thumbnail(pixels),
        digest=hashlib.blake2b(data if isinstance(data, bytes) else pixels.tobytes(), digest_size=16).digest(),
        seconds=seconds,
        contrast=contrast(pixels),
        pages=getattr(opened, "pages", 1),
    )


def _spread(values: list[int] | list[float]) -> Spread:
    return Spread(*np.quantile(values or [0.0], [0, 0.05, 0.5, 0.95, 1]).tolist())
