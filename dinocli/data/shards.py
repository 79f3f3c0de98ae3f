"""Tar shards in the WebDataset form: many images in a file that is read from its start to its end."""

from __future__ import annotations

import contextlib
import glob
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dinocli.checksums import unseal
from dinocli.data.listing import ARRAY, SUFFIXES
from dinocli.data.tar import PIPE, LocalTar, PipedTar, Span, members
from dinocli.errors import DinoError

INDEX = "index.json"
_PACKED = (".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2")
# WebDataset's rule (webdataset/tariterators.py): the key ends at the first dot of the last part of the name.
_KEY = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_OPEN = 32  # files kept open for the samples that wait in a buffer


class Sample(NamedTuple):
    """An image of a shard.

    Attributes:
        epoch: How often the stream has begun again; 0 in one pass.
        number: The same in every run: the shard's place in the list times 2**32, and the image's place in the shard.
        name: The shard's file name, a slash, the name in the shard.
        data: The image's file; empty where it, or with the shard's name alone the rest of a shard, cannot be read.
        label: -1 where there is none.
    """

    epoch: int
    number: int
    name: str
    data: bytes
    label: int


class _Item(NamedTuple):
    """A sample that waits: what it holds, or where that lies."""

    number: int
    name: str
    image: bytes | Span
    label: bytes | Span


@dataclass(frozen=True)
class Shards:
    """A list of tar files, or of commands that print them.

    Attributes:
        where: As the user named them.
        urls: Paths, or `pipe:COMMAND`.
        classes: Names of the classes, where an index tells them.
        counts: Images a shard, the torn rest of a shard being one; none where they cannot be known.
    """

    where: str
    urls: list[str]
    classes: list[str]
    counts: list[int] | None

    @property
    def count(self) -> int | None:
        """Images in all."""
        return None if self.counts is None else sum(self.counts)

    @property
    def fingerprint(self) -> str:
        """The same for the same files or commands in the same order, wherever their folder lies."""
        names = [url if url.startswith(PIPE) else os.path.basename(url) for url in self.urls]
        return f"{zlib.crc32(json.dumps([names, self.counts]).encode()):08x}"

    def stream(
        self, lane: int, lanes: int, *, seed: int | None = None, skip: int = 0, buffer: int = 1000
    ) -> Iterator[Sample]:
        """The samples of one reader among several, which together read each image once an epoch.

        With fewer shards than readers each of them reads all shards, and keeps its share.

        Args:
            lane: Which reader this is.
            lanes: How many readers there are.
            seed: Of an endless stream in an order drawn anew each epoch; absent, one pass in order.
            skip: Samples to pass over, of which in local files only the headers are read, or not even those.
            buffer: Samples among which the next is drawn.

        Raises:
            DinoError: A command failed or what it printed is torn; or there is nothing for this reader.
        """
        opened: dict[str, int] = {}
        empty = 0
        try:
            for epoch in range(1) if seed is None else itertools.count():
                order: Sequence[int] = range(len(self.urls))
                if seed is not None:
                    order = np.random.default_rng((seed, epoch)).permutation(len(self.urls)).tolist()
                length = self._length(order, lane, lanes)
                if length and length <= skip:
                    skip -= length
                    continue
                items = self._lane(order, lane, lanes, ahead=not skip)
                if seed is not None:
                    items = _shuffled(items, np.random.default_rng((seed, epoch, lane)), max(1, buffer))
                empty += 1
                for item in items:
                    empty = 0
                    if skip:
                        skip -= 1
                        continue
                    data, label = _read(item.image, opened), _label(_read(item.label, opened))
                    yield Sample(epoch, item.number, item.name, data, label)
                # A reader whose one shard is empty has another in the next epoch: once alone says nothing.
                if seed is not None and empty >= 10:
                    raise DinoError(
                        f"{self.where} holds too few images for {lanes} readers", "fewer --workers, or more images"
                    )
        finally:
            for file in opened.values():
                os.close(file)

    def _length(self, order: Sequence[int], lane: int, lanes: int) -> int | None:
        if self.counts is None:
            return None
        if len(order) >= lanes:
            return sum(self.counts[shard] for shard in order[lane::lanes])
        return len(range(lane, sum(self.counts), lanes))

    def _lane(self, order: Sequence[int], lane: int, lanes: int, ahead: bool) -> Iterator[_Item]:
        if len(order) >= lanes:
            return itertools.chain.from_iterable(self._items(shard, ahead) for shard in order[lane::lanes])
        every = itertools.chain.from_iterable(self._items(shard, ahead=False) for shard in order)
        return itertools.islice(every, lane, None, lanes)

    def _items(self, shard: int, ahead: bool) -> Iterator[_Item]:
        """The images of one shard; where it is torn, an empty one for the rest."""
        url = self.urls[shard]
        title = (re.findall(r"[^\s/]+\.tar\b", url) or [url])[-1] if url.startswith(PIPE) else os.path.basename(url)
        number = shard * 2**32
        with contextlib.closing(PipedTar(url) if url.startswith(PIPE) else LocalTar(url, ahead)) as tape:
            for name, image, label in _samples(tape):
                yield _Item(number, f"{title}/{name}", image, label)
                number += 1
            tape.finish()
        if tape.torn:
            yield _Item(number, title, b"", b"")


def is_shards(spec: str) -> bool:
    """Whether what a user named is tar shards: by its name, or a folder in which there are tar files and no images."""
    if not os.path.isdir(spec):
        return spec.startswith(PIPE) or spec.lower().endswith((".tar", *_PACKED))
    found = False
    with os.scandir(spec) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            suffix = os.path.splitext(entry.name)[1].lower()
            if suffix in SUFFIXES or entry.is_dir():
                return False
            found = found or suffix == ".tar"
    return found


def open_shards(spec: str) -> Shards:
    """Open tar shards.

    Args:
        spec: Paths with ranges and patterns (`train-{000000..000999}.tar`, `train-*.tar`), a folder of tar files, or
            `pipe:COMMAND`, in which ranges stand for several commands.

    Raises:
        DinoError: A shard is missing, or there is no image in them.
    """
    if spec.startswith(PIPE):
        if not spec.removeprefix(PIPE).strip():
            raise DinoError("a command was wanted after pipe:", "pipe:cat train-{000..099}.tar")
        return Shards(spec, list(_ranges(spec)), [], None)
    if spec.lower().endswith(_PACKED):
        raise DinoError(f"{spec} is compressed; plain tar files are read", f"'pipe:gzip -dc {spec}', or unpack them")
    urls = _paths(spec)
    missing = next((url for url in urls if not os.path.isfile(url)), None)
    if missing or not urls:
        what = f"{missing} does not exist" if missing else f"none is at {spec}"
        raise DinoError(f"tar shards were wanted; {what}", "check the path, and the first and last number of a range")
    known, classes = _indexed(urls)
    unknown = [url for url in urls if url not in known]
    # Threads, for a disk at the other end of a network answers many questions in the time of one.
    with ThreadPoolExecutor(8) as pool:
        known |= zip(unknown, pool.map(_count, unknown), strict=True)
    if not any(images for images, _ in known.values()):
        torn = next((f": {url} {torn}" for url, (_, torn) in known.items() if torn), "")
        raise DinoError(
            f"no images in the {len(urls)} tar files of {spec}{torn}",
            "a shard holds files such as KEY.jpg, and KEY.cls for a label; `dino pack IMAGES OUT` writes them",
        )
    return Shards(spec, urls, classes, [known[url][0] + bool(known[url][1]) for url in urls])


def _ranges(text: str) -> Iterator[str]:
    """Every text that one with ranges stands for, as a shell spells them: {08..10} is 08, 09, 10."""
    found = _RANGE.search(text)
    if not found:
        yield text
        return
    first, last = int(found[1]), int(found[2])
    padded = any(len(end) > 1 and end.startswith("0") for end in found.groups())
    width = max(map(len, found.groups())) if padded else 0
    for number in range(first, last + 1) if first <= last else range(first, last - 1, -1):
        yield from _ranges(f"{text[: found.start()]}{number:0{width}}{text[found.end() :]}")


def _paths(spec: str) -> list[str]:
    if os.path.isdir(spec):
        return sorted(str(path) for path in Path(spec).glob("*.[tT][aA][rR]") if not path.name.startswith("."))
    paths = []
    for text in _ranges(spec):
        plain = os.path.exists(text) or not glob.has_magic(text)
        paths += [text] if plain else sorted(glob.glob(text))
    return paths


def _indexed(urls: Sequence[str]) -> tuple[dict[str, tuple[int, str]], list[str]]:
    """Images of the shards whose size is that in the index beside them, none of them torn; and the names of classes.

    Raises:
        DinoError: An index is damaged, or names other files than shards beside it.
    """
    known: dict[str, tuple[int, str]] = {}
    classes: list[str] = []
    for folder in dict.fromkeys(os.path.dirname(url) for url in urls):
        path = Path(folder) / INDEX
        try:
            text = path.read_bytes()
        except OSError:  # reading the shards' headers tells the counts too
            continue
        try:
            index = unseal(text)
        except ValueError as error:
            # Other tools have files of this name. Ours alone holds names of classes, which must not get lost unsaid.
            if b'"shards"' in text or (Path(folder) / "pack.json").exists():
                raise _damaged_index(path, str(error)) from error
            continue
        if not {"classes", "shards", "bytes"} <= index.keys():  # of another tool
            continue
        counts, sizes, names = index["shards"], index["bytes"], index["classes"]
        if not (isinstance(counts, dict) and isinstance(sizes, dict) and isinstance(names, list)):
            raise _damaged_index(path, "it has no numbers of images and bytes for each shard")
        for name, number in [*counts.items(), *sizes.items()]:
            if name != os.path.basename(name) or "\\" in name:
                raise _damaged_index(path, f"it names {name}, which is no file in this folder")
            if not isinstance(number, int) or isinstance(number, bool) or number < 0:
                raise _damaged_index(path, f"it says {number} of {name}")
        beside = {os.path.join(folder, name): (counts[name], size) for name, size in sizes.items() if name in counts}
        known |= {u: (beside[u][0], "") for u in urls if u in beside and os.path.getsize(u) == beside[u][1]}
        classes = classes or [str(name) for name in names]
    return known, classes


def _damaged_index(path: Path, why: str) -> DinoError:
    return DinoError(f"{path} is damaged: {why}", "pack the images again, or remove it: the shards are counted then")


def _count(url: str) -> tuple[int, str]:
    with contextlib.closing(LocalTar(url)) as tape:
        return sum(1 for _ in _samples(tape)), tape.torn


def _shuffled(items: Iterable[_Item], generator: np.random.Generator, buffer: int) -> Iterator[_Item]:
    held: list[_Item] = []
    for item in items:
        if len(held) < buffer:
            held.append(item)
            continue
        place = int(generator.integers(buffer))
        drawn, held[place] = held[place], item
        yield drawn
    for place in generator.permutation(len(held)):
        yield held[place]


def _samples(tape: LocalTar | PipedTar) -> Iterator[tuple[str, bytes | Span, bytes | Span]]:
    """Name, image and label of each sample: neighbours of one key; what has no image is passed over."""
    found = ((name, _KEY.fullmatch(name), content) for name, content in members(tape) if not _META.match(name))
    keyed = ((name, key, content) for name, key, content in found if key)
    for _, group in itertools.groupby(keyed, lambda member: member[1][1]):
        parts = [(key[2].lower(), name, content) for name, key, content in group]
        ends = ["." + suffix.rpartition(".")[2] for suffix, _, _ in parts]
        images = [part for part, end in zip(parts, ends, strict=True) if end in SUFFIXES]
        images = images or [part for part, end in zip(parts, ends, strict=True) if end == ARRAY]
        if images:
            # Of `a.jpg` and `a.mask.png` the first is the image; it may also stand alone as `a.v2.jpg`.
            _, name, image = min(images, key=lambda part: part[0].count("."))
            labels = {suffix: content for suffix, _, content in parts}
            yield name, image, labels.get("cls", labels.get("json", b""))


def _read(content: bytes | Span, opened: dict[str, int]) -> bytes:
    """The bytes; none where they have gone. `opened` keeps the files that were read last, the oldest first."""
    if not isinstance(content, Span):
        return content
    try:
        file = opened.pop(content.path, -1)
        opened[content.path] = file if file >= 0 else os.open(content.path, os.O_RDONLY)
        if len(opened) > _OPEN:
            os.close(opened.pop(next(iter(opened))))
        data = os.pread(opened[content.path], content.size, content.offset)
    except OSError:
        return b""
    return data if len(data) == content.size else b""


def read_sample(shards: Shards, name: str) -> bytes:
    """The image of a name as `Sample` has it, from local shards; none where it is not there."""
    title, _, inside = name.partition("/")
    for url in shards.urls:
        if os.path.basename(url) == title and not url.startswith(PIPE):
            with contextlib.closing(LocalTar(url)) as tape:
                return next((_read(content, {}) for member, content in members(tape) if member == inside), b"")
    return b""


def _label(text: bytes) -> int:
    """An integer as text, or a table with one as `label` or `cls`."""
    try:
        value = json.loads(text)
        value = value.get("label", value.get("cls")) if isinstance(value, dict) else value
    except ValueError:
        value = int(text) if text.strip().isdigit() else -1  # 007 is no JSON
    return value if isinstance(value, int) and not isinstance(value, bool) else -1
