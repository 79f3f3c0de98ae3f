"""WebDataset samples from the members of a tar: an image and its label share a key."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from dinocli.data.sources.kinds import kind_of
from dinocli.data.sources.listing import ARRAY, JUNK, SUFFIXES
from dinocli.data.sources.tar import Content, LocalTar, Sparse, Tape, Unread, members, too_large

# WebDataset's rule (webdataset/tariterators.py): the key ends at the first dot of the last part of the name.
_KEY = re.compile(r"((?:.*/|)[^./]+)[.]([^/]*)", re.DOTALL)
# WebDataset's own members, macOS resource forks, and hidden files and folders: not images, as in a folder.
_HIDDEN = re.compile(rf"^__[^/]*__(?:$|/)|(?:^|/)(?:(?:{'|'.join(JUNK)})/|\.(?!\.?/))")
_NUMBER = re.compile(r"\d+(\.\d+)*")
LABELS = ("cls", "json")
_OPEN = 32  # files kept open for the samples that wait in a buffer
LABEL_BYTES = 2**20  # longer members are not labels
_TOGETHER = 32  # images of one key that may show one object; more are separate samples
_LONGEST_CLASS = 200  # characters; a longer text is a caption
MOST_CLASSES = 2**16
_DENSE = 100_000  # class numbers below this are classes even without an image


class Raw(NamedTuple):
    """Sample whose contents may not be read yet.

    Attributes:
        name: Name of the image in the tar.
        image: Content of the image.
        label: Content of the label; empty if there is none.
        kind: Suffix of the label.
    """

    name: str
    image: Content
    label: Content
    kind: str


@dataclass
class Tally:
    """Counts and names of ignored members, and of images that share a key.

    Attributes:
        kinds: Number of files of other kinds, by suffix.
        links: Images that are links to files outside the archive.
        shared: Images that share their key with others and are read separately.
        beside: Images that are parts of another image's sample and are not read.
        orphans: Labels without an image, by the name of the missing image without its suffix.
        lost: Names of orphans that are certainly labels (`.cls`). JSON may hold anything.
    """

    kinds: Counter[str] = field(default_factory=Counter)
    links: list[str] = field(default_factory=list)
    shared: list[str] = field(default_factory=list)
    beside: list[str] = field(default_factory=list)
    orphans: dict[str, Content] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)


class _Part(NamedTuple):
    suffix: str
    name: str
    content: Content

    @property
    def rest(self) -> str:
        """Part between key and last suffix: `mask` in `a.mask.png`."""
        return self.suffix.rpartition(".")[0]


def samples(
    tape: Tape, most: float = float("inf"), tally: Tally | None = None, labels: Mapping[str, Content] | None = None
) -> Iterator[Raw]:
    """Yield the samples of a tar: adjacent members with the same key. Members without an image are ignored.

    Args:
        tape: Tar to read.
        most: Size limit for an image read through a pipe, in bytes.
        tally: Counter of ignored members.
        labels: Labels stored apart from their images, by image name without suffix.
    """
    counts, local = tally or Tally(), isinstance(tape, LocalTar)

    def bound(name: str) -> int:
        suffix = "." + name.rpartition(".")[2].lower()
        if suffix in SUFFIXES or suffix == ARRAY:
            return int(min(most, 2**62))
        return LABEL_BYTES if suffix[1:] in LABELS else 0

    found = (
        (name, _KEY.fullmatch(name), content) for name, content in members(tape, bound) if not _HIDDEN.search(name)
    )
    keyed = ((name, key, content) for name, key, content in found if key)
    for key, group in itertools.groupby(keyed, lambda member: member[1][1]):
        parts = (_Part(match[2].lower(), name, content) for name, match, content in group)
        for some in _split(parts, local, counts):
            yield from _of_key(key, some, counts, labels or {})


def _split(parts: Iterable[_Part], local: bool, counts: Tally) -> Iterator[list[_Part]]:
    """Yield the parts of one key, in groups if there are many: names like 2021.05.01.png give a whole tar one key."""
    held, images = list[_Part](), 0
    for part in parts:
        if isinstance(part.content, Unread) and local and _is_image(part):
            counts.links.append(part.name)
            continue
        # An image and its label stay together, whichever comes first.
        if images >= _TOGETHER and part.rest != held[-1].rest:
            yield held
            held, images = [], 0
        held.append(part)
        images += _is_image(part)
    if held:
        yield held


def _of_key(key: str, parts: list[_Part], counts: Tally, apart: Mapping[str, Content]) -> Iterator[Raw]:
    images = [part for part in parts if _is_image(part)]
    arrays = [part for part in parts if part.suffix.rpartition(".")[2] == ARRAY[1:]]
    images = images or arrays
    labels = {part.suffix: part.content for part in parts if part.suffix.rpartition(".")[2] in LABELS}
    for part in parts:
        last = part.suffix.rpartition(".")[2]
        if last not in LABELS and part not in images:
            counts.kinds[kind_of(f"x.{part.suffix}")] += 1
    if not images:
        for suffix, content in labels.items():
            stem = f"{key}.{suffix}".rpartition(".")[0]
            counts.orphans.setdefault(stem, content)
            counts.lost += [f"{key}.{suffix}"] if suffix.endswith("cls") else []
        return
    own = _select_own(images)
    counts.beside += [part.name for part in images if part not in own]
    counts.shared += [part.name for part in own] if len(own) > 1 else []
    for part in own:
        stems = [part.rest, ""] if part.rest else [""]
        suffixes = [f"{stem}.{label}" if stem else label for stem in stems for label in LABELS]
        kind = next((suffix for suffix in suffixes if suffix in labels), "")
        label = labels[kind] if kind else apart.get(f"{key}.{part.rest}" if part.rest else key, apart.get(key, b""))
        yield Raw(part.name, part.content, label, kind.rpartition(".")[2])


def _is_image(part: _Part) -> bool:
    return "." + part.suffix.rpartition(".")[2] in SUFFIXES


def _select_own(images: list[_Part]) -> list[_Part]:
    """Return the images of a key that are samples of their own.

    With `a.jpg` and `a.mask.png`, the second is a part of the first image's sample. The same holds for `a.jpg` and
    `a.png`. But `2021.05.01.png` and `2021.05.02.png` are two samples, although their key, which ends at the first dot,
    is the same.
    """
    if len(images) == 1:
        return images
    ordered = sorted(images, key=lambda part: part.suffix.count("."))  # fewer dots first; stable
    own: list[_Part] = []
    for part in ordered:
        if not any(_belongs(part, other) for other in own):
            own.append(part)
    return [part for part in images if part in own]


def _belongs(part: _Part, other: _Part) -> bool:
    if part.rest == other.rest:
        return part.name != other.name  # a repeated name is another image
    inner = part.rest.removeprefix(f"{other.rest}." if other.rest else "")
    return (not other.rest or inner != part.rest) and not _NUMBER.fullmatch(inner)


def label_of(text: bytes) -> int | str | None:
    """Return the label in a `.cls` or `.json` member: a number, a name, or an object's `label` or `cls` entry.

    Multi-line texts, empty texts and negative numbers are not labels.
    """
    try:
        value = json.loads(text.decode("utf-8-sig"))
        if isinstance(value, dict):
            value = value.get("label", value.get("cls"))
    except UnicodeDecodeError:
        return None
    except (ValueError, RecursionError):
        value = text.decode("utf-8-sig").strip()
        if value[:1] in ("{", "["):
            return None
        if value.isdecimal():  # 007 is not valid JSON
            value = int(value) if len(value) < 19 else value
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value if 0 <= value < 2**62 else None
    if not isinstance(value, str):
        return None
    value = value.strip()
    if value.isdecimal() and len(value) < 19:
        return int(value)
    return value if value.isprintable() and 0 < len(value) <= _LONGEST_CLASS else None


def classes_of(labels: set[int | str]) -> tuple[list[str], bool]:
    """Return the class names, and True if labels are looked up by name, False if they are class indices.

    Numeric classes span 0 to the largest number, so that two splits agree. Names are sorted as text, numbers included.
    """
    texts = {label for label in labels if isinstance(label, str)}
    numbers = sorted(label for label in labels if isinstance(label, int))
    if len(labels) > MOST_CLASSES:
        return [], True
    if not texts and (not numbers or numbers[-1] < _DENSE):
        return [str(i) for i in range(numbers[-1] + 1)] if numbers else [], False
    names = [str(number) for number in numbers]
    return (sorted(texts.union(names)) if texts else names), True


def why_refused(content: Content, most: float) -> str:
    """Return the reason not to read a member; empty if there is none."""
    if isinstance(content, Unread):
        return content.reason
    size = len(content) if isinstance(content, bytes) else content.size
    return too_large(size, most).reason if size > most else ""


def read(content: Content, opened: dict[str, int]) -> bytes:
    """Return the bytes of a member; empty if they cannot be read.

    Args:
        content: Content of the member.
        opened: File descriptors by path, least recently used first; the caller closes them.
    """
    if isinstance(content, bytes | Unread):
        return content if isinstance(content, bytes) else b""
    try:
        file = opened.pop(content.path, -1)
        opened[content.path] = file if file >= 0 else os.open(content.path, os.O_RDONLY)
        if len(opened) > _OPEN:
            os.close(opened.pop(next(iter(opened))))
        if isinstance(content, Sparse):
            return _expand(content, opened[content.path])
        data = os.pread(opened[content.path], content.size, content.offset)
    except OSError:
        return b""
    return data if len(data) == content.size else b""


def _expand(content: Sparse, file: int) -> bytes:
    data = bytearray(content.size)
    for place, offset, length in content.pieces:
        piece = os.pread(file, length, offset)
        if len(piece) < length:
            return b""
        data[place : place + length] = piece
    return bytes(data)


def read_label(content: Content, opened: dict[str, int]) -> int | str | None:
    """Read a label; None if there is no valid one."""
    # The size is checked first: larger members are not labels.
    return None if why_refused(content, LABEL_BYTES) or not content else label_of(read(content, opened))


def read_once(content: Content) -> bytes:
    """Return the bytes of one member without keeping a file open."""
    opened: dict[str, int] = {}
    try:
        return read(content, opened)
    finally:
        for file in opened.values():
            os.close(file)
