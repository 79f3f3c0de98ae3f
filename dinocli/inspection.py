"""Inspection: what the images of a source are like, from a fair draw of them."""

from __future__ import annotations

import hashlib
import math
import os
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

from dinocli.data.decode import BadImage, has_fast_jpeg, open_image, reduction
from dinocli.data.images import DEFAULTS, ImagesConfig
from dinocli.data.shards import Shards
from dinocli.data.sources import Images, Source, TorchvisionImages
from dinocli.twins import SIDE, Pair, is_flat, near_equal, thumbnail

Read = Callable[[], "bytes | Image.Image | BadImage"]

_SECONDS = 45.0  # after which no more are drawn
_PIPES, _SHARDS = 4, 50  # from how many the draw comes
_ENOUGH = 250_000  # pixels; larger JPEGs are decoded smaller where the decoder can


@dataclass(frozen=True)
class Spread:
    """Where a number lies: its least, 5 %, half, 95 % and most."""

    least: float
    low: float
    median: float
    high: float
    most: float


@dataclass(frozen=True)
class Inspection:
    """What was seen.

    Attributes:
        where: The source as the user named it.
        kind: `files`, `shards`, or `decoded` for what comes without files.
        count: Images in all; absent where a pipe does not tell.
        classes: How many there are, by folders, list or index; 0 for unlabelled images.
        drawn: Images that were looked at.
        read: Of them, how many could be read.
        formats: Of those that were read, how many there are of each.
        width: In pixels.
        height: In pixels.
        short: The shorter side, in pixels.
        aspect: Long side by short side.
        megabytes: Of the decoded pixels, on average.
        deep: Images with more than 8 bits.
        gray: Images without colors, the deep ones among them.
        flat: Images of one color.
        bad: Name and reason of each that could not be read.
        copies: Images that are an earlier one again, byte for byte.
        near: Images that look nearly like an earlier one and are no copies.
        pairs: The most alike of those.
        mean: Of the channels, 0 to 1, each image with the same weight. C numbers.
        std: Of the channels.
        milliseconds: To read and decode an image; half take less.
        seconds: That the inspection took.
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

    @property
    def whole(self) -> bool:
        """Whether every image was looked at."""
        return self.drawn == self.count


class _Look(NamedTuple):
    """One image, as far as it was looked at."""

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


def inspect(
    source: Source,
    *,
    images: ImagesConfig = DEFAULTS,
    sample: int = 2000,
    seed: int = 0,
    seconds: float = _SECONDS,
    report: Callable[[int], None] = lambda images: None,
) -> Inspection:
    """Decode some images of a source and tell what they are like; all of them where they are few.

    Args:
        source: The images.
        images: What is taken for readable.
        sample: How many to draw.
        seed: Of the draw.
        seconds: After which no more are drawn.
        report: Called with the number of images looked at so far.
    """
    has_fast_jpeg()  # which loads torch, once: not to be counted as an image's time
    looks, start = list[_Look](), time.monotonic()
    threads = min(16, os.cpu_count() or 1)
    draw = islice(_drawn(source, images, sample, seed), sample)
    with ThreadPoolExecutor(threads) as pool:  # Pillow decodes without holding the interpreter
        while time.monotonic() - start < seconds and (some := list(islice(draw, 4 * threads))):
            looks += pool.map(partial(_look, images), *zip(*some, strict=True))
            report(len(looks))
    kind = "shards" if isinstance(source, Shards) else "files"
    if isinstance(source, TorchvisionImages):
        kind = "decoded"
    good = [look for look in looks if not look.reason]
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
        # A JPEG of a grey picture in three channels has them equal but for rounding.
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
    )


def _drawn(source: Source, images: ImagesConfig, sample: int, seed: int) -> Iterator[tuple[str, Read]]:
    """Names of images, and what reads each, in a random order; of shards from some, a few of each."""
    generator = np.random.default_rng(seed)
    if isinstance(source, Images):
        for row in generator.permutation(len(source))[:sample].tolist():
            yield source.names[row], partial(source.read, row)
        return
    counts = source.counts or [sample] * len(source.urls)
    order = [shard for shard in generator.permutation(len(counts)).tolist() if counts[shard]]
    if sum(counts) > sample:
        order = order[: _SHARDS if source.counts else _PIPES]
    share = sample if sum(counts) <= sample else math.ceil(sample / len(order))
    for shard in order:
        one = replace(source, urls=[source.urls[shard]], counts=[counts[shard]] if source.counts else None)
        # Of what cannot be asked for its headers alone, the first ones: all of it would be loaded for a fair draw.
        order_of = {"seed": seed, "buffer": counts[shard]} if source.counts else {}
        stream = one.stream(0, 1, max_megabytes=images.max_megabytes, **order_of)
        for found in islice(stream, min(share, counts[shard])):
            yield found.name, partial(_given, BadImage(found.reason) if found.reason else found.data)


def _given(data: bytes | BadImage) -> bytes | BadImage:
    return data


def _look(images: ImagesConfig, name: str, read: Read) -> _Look:
    start = time.perf_counter()
    try:
        data = read()
    except OSError as error:
        return _Look(name, f"cannot be opened: {error.strerror or error}")
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
        deep=opened.mode.startswith(("I", "F")),
        width=opened.width,
        height=opened.height,
        mean=some.mean(axis=0),
        square=(some**2).mean(axis=0),
        thumb=thumbnail(pixels),
        digest=hashlib.blake2b(data if isinstance(data, bytes) else pixels.tobytes(), digest_size=16).digest(),
        seconds=seconds,
    )


def _spread(values: list[int] | list[float]) -> Spread:
    return Spread(*np.quantile(values or [0.0], [0, 0.05, 0.5, 0.95, 1]).tolist())
