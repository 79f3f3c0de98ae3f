"""Images among the members of an archive or of a remote folder: selected, named and labelled as in a local folder."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dinocli.core.errors import DinoError
from dinocli.data.decode.extras import HOLDERS
from dinocli.data.sources.indexed import folder_classes
from dinocli.data.sources.kinds import kind_of, notes_of, remedy, unread
from dinocli.data.sources.listing import ARRAY, JUNK, SUFFIXES, Names
from dinocli.data.sources.outputs import MARKER, Ours, parse_marker

_REMEDY = "slices, frames and tiles are read from local folders: unpack or copy the files"
_LARGEST_MARKER = 2**20  # bytes; a longer file of this name is not ours


class Selected(NamedTuple):
    """Images among members.

    Attributes:
        rows: Index of each image among the members. [S]
        names: Names of the images, sorted, without the folders that all images share.
        classes: Class names; empty for unlabelled images.
        labels: Class index per image, -1 if unlabelled. [S]
        notes: Messages for the user about members that are not read.
    """

    rows: NDArray[np.int64]
    names: Names
    classes: list[str]
    labels: NDArray[np.int32]
    notes: tuple[str, ...]


def select_images(where: str, members: Sequence[str], read: Callable[[int, int], bytes]) -> Selected:
    """Select the images among members, as `image_folder` does for files.

    Hidden members and outputs of this tool are ignored; of members with the same name, the last one counts. Folders
    that all images share are removed from their names, so that `photos/cat/1.jpg` has the class `cat`.

    Args:
        where: Archive or folder, as the user named it.
        members: Paths with `/` between folders.
        read: Function that returns the content of a member up to a size in bytes, to read markers of outputs.

    Raises:
        DinoError: If there is no image.
    """
    last = {name.removeprefix("./"): row for row, name in enumerate(members) if not name.endswith("/")}
    ours = dict(_markers(last, read))
    chosen: dict[str, list[str]] = {"image": [], "array": []}
    kinds, hidden = Counter[str](), list[str]()
    for name in last:
        folders, _, file = name.rpartition("/")
        parts = folders.split("/") if folders else []
        if file.startswith(".") or any(part.startswith(".") or part in JUNK for part in parts):
            continue
        if ours and (output := _output(parts, file, ours)):
            hidden.append(output)
            continue
        suffix = os.path.splitext(file)[1].lower()
        if suffix in SUFFIXES or suffix == ARRAY:
            chosen["array" if suffix == ARRAY else "image"].append(name)
        if suffix not in SUFFIXES:
            kinds[kind_of(file)] += 1
    paths = sorted(chosen["image"] or chosen["array"])
    if not paths:
        hint = _REMEDY if _held(kinds) else remedy(where, kinds, {})
        raise DinoError(f"no images in {where}: it holds {unread(kinds) or 'nothing'}", hint)
    if not chosen["image"]:
        del kinds[ARRAY]
    first, final = (path.split("/")[:-1] for path in (paths[0], paths[-1]))  # sorted: all others lie between
    shared = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(first, final, strict=False))))
    names = [path.split("/", shared)[shared] for path in paths]
    return Selected(
        np.array([last[path] for path in paths], np.int64),
        Names.of(names),
        *folder_classes(names),
        tuple(_notes(where, sorted(set(hidden)), kinds)),
    )


def _markers(last: dict[str, int], read: Callable[[int, int], bytes]) -> Iterator[tuple[str, Ours]]:
    """Yield each folder with outputs; the archive's own folder counts only if its marker lists files."""
    for name, row in last.items():
        folder, _, file = name.rpartition("/")
        if file == MARKER and (ours := parse_marker(read(row, _LARGEST_MARKER))):
            yield folder, ours


def _output(parts: list[str], file: str, ours: dict[str, Ours]) -> str:
    """Return the output that a member belongs to, a file or a folder with a slash; empty if none."""
    path = [*parts, file]
    for depth in range(len(path)):
        found = ours.get("/".join(path[:depth]))
        if found and found.whole and depth:
            return "/".join(path[:depth]) + "/"
        if found and found.hides.fullmatch(path[depth]):
            return "/".join(path[: depth + 1])
    return ""


def _notes(where: str, ours: Sequence[str], kinds: Counter[str]) -> Iterator[str]:
    if ours:
        more = f" and {len(ours) - 3} more" if ours[3:] else ""
        yield f"ignoring {', '.join(ours[:3])}{more} in {where}: written by dino"
    held = _held(kinds)
    yield from notes_of({kind: count for kind, count in kinds.items() if kind not in held}, f"not read in {where}")
    if held:
        yield f"not read in {where}: {unread(held)}; {_REMEDY}"


def _held(kinds: Counter[str]) -> dict[str, int]:
    """Return the kinds of files with several images; no extra reads these inside an archive."""
    return {kind: count for kind, count in kinds.items() if any(kind in extra.suffixes for extra in HOLDERS)}
