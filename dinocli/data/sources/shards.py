"""Tar shards in the WebDataset format: many images per file, read sequentially."""

from __future__ import annotations

import contextlib
import glob
import itertools
import json
import os
import re
import shlex
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dinocli.core.checksums import unseal
from dinocli.core.errors import DinoError
from dinocli.data.images import DEFAULTS
from dinocli.data.sources.kinds import remedy, unread
from dinocli.data.sources.listing import JUNK, SUFFIXES
from dinocli.data.sources.outputs import SIGNS, is_output, is_sheet, recognise
from dinocli.data.sources.remote_file import RemoteFile
from dinocli.data.sources.samples import classes_of, read, read_label, read_once, samples, why_refused
from dinocli.data.sources.scans import Scan, labels_apart, notes_of, scan
from dinocli.data.sources.store import Denied, is_remote, resolve, size_of, version_of
from dinocli.data.sources.tar import PIPE, UNENDED, Content, members, tape_of

INDEX = "index.json"
# Suffixes of compressed tar files, with the command that decompresses one.
_PACKED = {".tar.gz": "gzip", ".tgz": "gzip", ".tar.zst": "zstd", ".tar.xz": "xz", ".tar.bz2": "bzip2"}
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
UNNUMBERED = -2  # label of an image from a pipe whose class is a name: its index needs the names of all classes
_THREADS = 32  # shards at addresses that are asked about at once
_PICTURES = 1000  # images next to shards that are checked for being outputs; more are a folder of images


class Sample(NamedTuple):
    """Image of a shard.

    Attributes:
        epoch: Index of the pass through the stream; 0 in a single pass.
        number: Number that is the same in every run: the shard's index times 2**32 plus the image's index in the shard.
        name: File name of the shard, a slash, and the name in the shard.
        data: Bytes of the image file; empty if it cannot be read. If `name` is the shard's name alone, the sample
            stands for the unreadable rest of the shard.
        label: Class index, or -1 if there is none.
        reason: Reason for not reading the image, if known without its data.
    """

    epoch: int
    number: int
    name: str
    data: bytes
    label: int
    reason: str = ""


class _Item(NamedTuple):
    """Queued sample: its contents, or their place in a file."""

    number: int
    name: str
    image: Content
    label: Content


@dataclass(frozen=True)
class Shards:
    """A list of tar files, or of commands that print them.

    Attributes:
        where: Shards as the user named them.
        urls: Paths, or `pipe:COMMAND`.
        classes: Class names, from an index or from the labels; empty for a pipe.
        counts: Images per shard; the unreadable rest of a corrupt shard counts as one. None if unknown.
        by_name: True if labels are class names; else they are class numbers.
        apart: Shards whose labels are stored apart from their images.
        notes: Messages for the user about members that are not read.
        versions: Checksum or time of each shard at an address, as its server states it; empty for other shards.
    """

    where: str
    urls: list[str]
    classes: list[str]
    counts: list[int] | None
    by_name: bool = False
    apart: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()
    versions: tuple[str, ...] = ()

    @property
    def count(self) -> int | None:
        """Number of images in all shards; None if unknown."""
        return None if self.counts is None else sum(self.counts)

    @property
    def fingerprint(self) -> str:
        """Checksum of the files or commands, their order and versions, independent of the folder's location."""
        names = [url if url.startswith(PIPE) else os.path.basename(url) for url in self.urls]
        facts = [names, self.counts, *([self.versions] if self.versions else [])]
        return f"{zlib.crc32(json.dumps(facts).encode()):08x}"

    def stream(
        self,
        lane: int,
        lanes: int,
        *,
        seed: int | None = None,
        skip: int = 0,
        buffer: int = 1000,
        max_megabytes: float = DEFAULTS.max_megabytes,
    ) -> Iterator[Sample]:
        """Yield the samples of one reader among several, which together read each image once per epoch.

        With fewer shards than readers, each reader reads all shards and keeps its share.

        Args:
            lane: Index of this reader.
            lanes: Number of readers.
            seed: Seed of an endless stream, reshuffled every epoch. If None, one pass in order.
            skip: Number of samples to skip. For these, at most the headers of local files are read.
            buffer: Size of the shuffle buffer.
            max_megabytes: Size limit per image; larger ones are not read.

        Raises:
            DinoError: If a command fails or its output is truncated, or this reader gets no images.
        """
        opened: dict[str, int] = {}
        empty, most = 0, max_megabytes * 1e6
        places = {name: i for i, name in enumerate(self.classes)}
        try:
            for epoch in range(1) if seed is None else itertools.count():
                order: Sequence[int] = range(len(self.urls))
                if seed is not None:
                    order = np.random.default_rng((seed, epoch)).permutation(len(self.urls)).tolist()
                length = self._length(order, lane, lanes)
                if length and length <= skip:
                    skip -= length
                    continue
                items = self._lane(order, lane, lanes, most, ahead=not skip)
                if seed is not None:
                    items = _shuffle(items, np.random.default_rng((seed, epoch, lane)), max(1, buffer))
                empty += 1
                for item in items:
                    empty = 0
                    if skip:
                        skip -= 1
                        continue
                    reason = why_refused(item.image, most)
                    data = b"" if reason else read(item.image, opened)
                    label = self._number(read_label(item.label, opened), places)
                    yield Sample(epoch, item.number, item.name, data, label, reason)
                # A reader whose only shard is empty gets another one in the next epoch, so one empty epoch is no error.
                if seed is not None and empty >= 10:
                    raise DinoError(
                        f"{self.where} holds too few images for {lanes} readers", "use fewer --workers, or more images"
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

    def _number(self, label: int | str | None, places: Mapping[str, int]) -> int:
        if isinstance(label, str) or (label is not None and self.by_name):
            return places.get(str(label), -1) if places else UNNUMBERED
        return -1 if label is None else label

    def _lane(self, order: Sequence[int], lane: int, lanes: int, most: float, ahead: bool) -> Iterator[_Item]:
        if len(order) >= lanes:
            return itertools.chain.from_iterable(self._items(shard, most, ahead) for shard in order[lane::lanes])
        every = itertools.chain.from_iterable(self._items(shard, most, ahead=False) for shard in order)
        return itertools.islice(every, lane, None, lanes)

    def _items(self, shard: int, most: float, ahead: bool) -> Iterator[_Item]:
        """Yield the images of one shard; if it is corrupt, an empty item stands for the rest."""
        url = self.urls[shard]
        title = (re.findall(r"[^\s/]+\.tar\b", url) or [url])[-1] if url.startswith(PIPE) else os.path.basename(url)
        number = shard * 2**32
        with contextlib.closing(tape_of(url, ahead)) as tape:
            for raw in samples(tape, most, labels=labels_apart(url) if url in self.apart else None):
                yield _Item(number, f"{title}/{raw.name}", raw.image, raw.label)
                number += 1
            tape.finish()
        if tape.torn:
            yield _Item(number, title, b"", b"")


def is_shards(spec: str) -> bool:
    """Return whether a source is tar shards: by its name, or as a folder with tar files and no images."""
    if not os.path.isdir(spec):
        return spec.startswith(PIPE) or spec.lower().endswith((".tar", *_PACKED))
    signs, folders, images, found = set[str](), list[str](), list[str](), False
    with os.scandir(spec) as entries:
        for entry in entries:
            if entry.name in SIGNS:
                signs.add(entry.name)
            if entry.name.startswith(".") or entry.name in JUNK:
                continue
            suffix = os.path.splitext(entry.name)[1].lower()
            if entry.is_dir():
                folders.append(entry.path)
            elif suffix in SUFFIXES:
                images.append(entry.name)
            found = found or suffix == ".tar"
            if len(images) > _PICTURES:
                return False
    hides = recognise(spec, signs).hides
    ours = all(hides.fullmatch(name) or is_sheet(spec, name) for name in images)
    return found and ours and all(map(is_output, folders))


def open_shards(*specs: str) -> Shards:
    """Open tar shards.

    Args:
        specs: Paths with ranges and patterns (`train-{000000..000999}.tar`, `train-*.tar`), folders of tar files, or
            `pipe:COMMAND`, in which a range expands to several commands. Paths may be addresses, `s3://b/x-{00..99}.tar`;
            without an index beside them, their images are not counted.

    Raises:
        DinoError: If a shard is missing, or the shards hold no image.
    """
    for spec in specs:
        _check_spec(spec)
    return open_shards_at(
        [url for each in specs for url in _expand(each)], shlex.join(specs) if specs[1:] else specs[0]
    )


def open_shards_at(urls: list[str], spec: str) -> Shards:
    """Open tar shards at paths, addresses or commands in which nothing is a pattern.

    Args:
        urls: Paths, addresses or `pipe:COMMAND`.
        spec: Shards as the user named them.

    Raises:
        DinoError: If a shard is missing, or the shards hold no image.
    """
    if any(url.startswith(PIPE) for url in urls):
        return Shards(spec, urls, [], None)
    sizes, versions = _measure(urls)
    missing = next((url for url in urls if url not in sizes), None)
    if missing or not urls:
        what = f"{missing} does not exist" if missing else f"no file matches {spec}"
        raise DinoError(f"{what}; expected tar shards", "check the path, and the first and last number of a range")
    known, classes, others = _read_indexes(sizes)
    notes = _notes_of_others(sizes, others)
    unknown = [url for url in urls if url not in known]
    if any(map(is_remote, unknown)):
        return Shards(spec, urls, [], None, notes=notes, versions=versions)
    # Threads, because a network disk answers many requests in the time of one.
    with ThreadPoolExecutor(8) as pool:
        known |= zip(unknown, pool.map(scan, unknown), strict=True)
    scans = [known[url] for url in urls]
    kinds = sum((each.tally.kinds for each in scans), Counter[str]())
    if not any(each.images for each in scans):
        torn = next((f": {url} {each.torn}" for url, each in zip(urls, scans, strict=True) if each.torn), "")
        seen = f": they hold {unread(kinds)}" if kinds and not torn else torn
        raise DinoError(
            f"no images in the {len(urls)} tar files of {spec}{seen}",
            remedy(spec, kinds, {})
            if kinds and not torn
            else "a shard holds files such as KEY.jpg, and KEY.cls for a label; `dino pack IMAGES OUT` writes them",
        )
    named, by_name = classes_of(set().union(*(each.labels for each in scans)))
    if classes:  # from an index; the shards hold its class numbers
        named, by_name = classes + sorted(set(named) - set(classes) if by_name else ()), False
    apart = frozenset(url for url, each in zip(urls, scans, strict=True) if each.apart)
    counts = [each.images + bool(each.torn) for each in scans]
    if cut := [url for url, each in zip(urls, scans, strict=True) if not each.ended]:
        notes += (f"{len(cut)} shards {UNENDED}, such as {cut[0]}: images may be missing",)
    return Shards(spec, urls, named, counts, by_name, apart, (*notes_of(scans, kinds), *notes), versions)


def _notes_of_others(sizes: Mapping[str, int], stated: Mapping[str, int]) -> tuple[str, ...]:
    """Return a note on shards whose size differs from that in the index, both in bytes."""
    if not stated:
        return ()
    url, size = next(iter(stated.items()))
    such = f"such as {url} of {sizes[url]} bytes; expected {size}"
    return (f"{len(stated)} shards differ in size from {INDEX}, {such}: images may be missing",)


def _measure(urls: Sequence[str]) -> tuple[dict[str, int], tuple[str, ...]]:
    """Return the size in bytes of the shards that exist, and the versions of all if some are at addresses."""
    remote = [url for url in urls if is_remote(url)]
    with ThreadPoolExecutor(_THREADS) as pool:
        stated = dict(zip(remote, pool.map(_state_of, remote), strict=True))
    sizes = {url: os.path.getsize(url) for url in urls if url not in stated and os.path.isfile(url)}
    sizes |= {url: size_of(about) for url, about in stated.items() if about is not None}
    return sizes, tuple(version_of(stated.get(url) or {}) for url in urls) if remote else ()


def _state_of(url: str) -> Mapping[str, Any] | None:
    store, key = resolve(url)
    return store.state_if_any(key)


def _check_spec(spec: str) -> None:
    if spec.startswith(PIPE) and not spec.removeprefix(PIPE).strip():
        raise DinoError("pipe: names no command; expected pipe:COMMAND", "pipe:cat train-{000..099}.tar")
    packed = next((command for suffix, command in _PACKED.items() if spec.lower().endswith(suffix)), "")
    if packed and is_remote(spec):
        raise DinoError(f"{spec} is compressed; expected plain tar files", f"unpack them, as with `{packed} -d`")
    if packed and not spec.startswith(PIPE):
        # Spaces and quotes are escaped for the command's shell; patterns stay patterns.
        name = re.sub(r"([^\w@%+=:,./*?\[\]{}-])", r"\\\1", spec)
        pipe = shlex.quote(f"{PIPE}{packed} -dc {name}")
        raise DinoError(f"{spec} is compressed; expected plain tar files", f"use {pipe}, or unpack them")


def _ranges(text: str) -> Iterator[str]:
    """Expand the ranges in a text as a shell does: {08..10} gives 08, 09, 10."""
    found = _RANGE.search(text)
    if not found:
        yield text
        return
    first, last = int(found[1]), int(found[2])
    padded = any(len(end) > 1 and end.startswith("0") for end in found.groups())
    width = max(map(len, found.groups())) if padded else 0
    for number in range(first, last + 1) if first <= last else range(first, last - 1, -1):
        yield from _ranges(f"{text[: found.start()]}{number:0{width}}{text[found.end() :]}")


def _expand(spec: str) -> list[str]:
    """Return the shards that a specification names."""
    if spec.startswith(PIPE):
        return list(_ranges(spec))
    if is_remote(spec):
        return [url for text in _ranges(spec) for url in _remote_paths(text)]
    if os.path.isdir(spec):
        return sorted(str(path) for path in Path(spec).glob("*.[tT][aA][rR]") if not path.name.startswith("."))
    paths = []
    for text in _ranges(spec):
        plain = os.path.exists(text) or not glob.has_magic(text)
        paths += [text] if plain else sorted(glob.glob(text, recursive=True))
    return paths


def _remote_paths(text: str) -> list[str]:
    store, _ = resolve(text)
    # In an address of the web, a question mark begins the query.
    if not glob.has_magic(text.replace("?", "") if store.is_web else text):
        return [text]
    if _state_of(text):  # brackets in a name are no pattern, as on a disk
        return [text]
    return sorted(store.address_of(key) for key in store.retry(lambda: store.files.glob(text), text))


def _read_indexes(size_by_url: Mapping[str, int]) -> tuple[dict[str, Scan], list[str], dict[str, int]]:
    """Return scans of the shards whose size in bytes matches the index next to them, and the class names.

    The last value is the stated size of the other shards in the index.

    Raises:
        DinoError: If an index is corrupt, or names files outside its folder.
    """
    known: dict[str, Scan] = {}
    classes: list[str] = []
    others: dict[str, int] = {}
    for folder in dict.fromkeys(os.path.dirname(url) for url in size_by_url):
        path = os.path.join(folder, INDEX)
        try:
            text = RemoteFile(path).readall() if is_remote(path) else Path(path).read_bytes()
        except (OSError, Denied):  # the headers of local shards give the counts too
            continue
        try:
            index = unseal(text)
        except ValueError as error:
            # Other tools write files of this name. Only ours holds class names, which must not be lost silently.
            if b'"shards"' in text or os.path.exists(os.path.join(folder, "pack.json")):
                raise _damaged_index(path, str(error)) from error
            continue
        if not {"classes", "shards", "bytes"} <= index.keys():  # from another tool
            continue
        counts, sizes, names = index["shards"], index["bytes"], index["classes"]
        if fault := _index_fault(counts, sizes, names):
            raise _damaged_index(path, fault)
        beside = {os.path.join(folder, name): (counts[name], size) for name, size in sizes.items() if name in counts}
        for url, size in size_by_url.items():
            if url in beside and size == beside[url][1]:
                known[url] = Scan(beside[url][0])
            elif url in beside:
                others[url] = beside[url][1]
        classes = classes or [str(name) for name in names]
    return known, classes, others


def _index_fault(counts: Any, sizes: Any, names: Any) -> str:
    """Return the fault of an index's entries; empty if they are valid."""
    if not (isinstance(counts, dict) and isinstance(sizes, dict) and isinstance(names, list)):
        return "it does not state the images and bytes of each shard"
    for name, number in [*counts.items(), *sizes.items()]:
        if name != os.path.basename(name) or "\\" in name:
            return f"it names {name}, which is not in this folder"
        if not isinstance(number, int) or isinstance(number, bool) or number < 0:
            return f"the count of {name} is {number!r}; expected a whole number"
    return ""


def _damaged_index(path: str, why: str) -> DinoError:
    return DinoError(
        f"{path} is corrupt: {why}", "pack the images again, or remove it; dino then counts the images itself"
    )


def _shuffle(items: Iterable[_Item], generator: np.random.Generator, buffer: int) -> Iterator[_Item]:
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


def read_sample(shards: Shards, name: str, max_megabytes: float = DEFAULTS.max_megabytes) -> bytes:
    """Return the image with a name as in `Sample`, from files; empty if it is not there."""
    most = max_megabytes * 1e6
    title, _, inside = name.partition("/")
    for url in shards.urls:
        if os.path.basename(url) == title and not url.startswith(PIPE):
            with contextlib.closing(tape_of(url)) as tape:
                found = (content for member, content in members(tape) if member == inside)
                return next((read_once(content) for content in found if not why_refused(content, most)), b"")
    return b""
