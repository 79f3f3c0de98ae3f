"""Recursive listing of a folder's files: fast, in little memory, and cached for large folders."""

from __future__ import annotations

import hashlib
import json
import os
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from dinocli.core.atomic import atomic
from dinocli.core.resources import cache_folder
from dinocli.data.decode.extras import EXTRAS
from dinocli.data.sources.kinds import kind_of, looks_like_dicom
from dinocli.data.sources.outputs import SHEETS, SIGNS, Ours, is_sheet, recognise

# Suffixes of image files: of all that can be read, and of those that the installed packages read.
PLAIN = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .tif .tiff .bmp .dib .gif .avif .jp2 .j2k .jpx .ppm .pgm .pbm .pnm .pfm "
    ".tga".split()
)
KNOWN = PLAIN.union(*(extra.suffixes for extra in EXTRAS))
SUFFIXES = PLAIN.union(*(extra.suffixes for extra in EXTRAS if extra.installed))
ARRAY = ".npy"  # counts as an image only if a folder holds no other kind
JUNK = frozenset({"__MACOSX", "@eaDir"})  # folders of resource forks and thumbnails that macOS and Synology add
_REMEMBERED = 20_000  # files; listing fewer is too fast to be worth a cache file
_SETTLED = 2_000_000_000  # nanoseconds; a folder changed more recently may change again within one clock tick


class Names(Sequence[str]):
    """File names in one block of memory, which worker processes share: their bytes plus eight per name."""

    def __init__(self, text: NDArray[np.uint8], ends: NDArray[np.int64]) -> None:
        self.text, self.ends = text, ends

    @classmethod
    def of(cls, names: Sequence[str]) -> Names:
        """Pack names, which may hold any bytes that a file system allows."""
        coded = [os.fsencode(name) for name in names]
        ends = np.cumsum([len(name) for name in coded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(coded), dtype=np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        return os.fsdecode(self.text[self.ends[index - 1] if index else 0 : self.ends[index]].tobytes())

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))


class Listing(NamedTuple):
    """Files below a folder.

    Attributes:
        names: Sorted names of the selected files, with `/` between folders.
        kinds: Number of other files by suffix; "" for files without one.
        ours: Ignored files and folders that this tool wrote; folders end with `/`.
        first: One file of each kind; empty for a listing from the cache.
    """

    names: Names
    kinds: dict[str, int]
    ours: list[str]
    first: dict[str, str]

    @property
    def others(self) -> int:
        """Number of other files."""
        return sum(self.kinds.values())


def list_files(root: Path, wanted: Callable[[str], bool], *, cached: bool = True) -> Listing:
    """List the files below a folder, following links and ignoring hidden files and outputs of this tool.

    A long listing is stored in the user's cache and reused until a folder below changes.

    Args:
        root: Folder to list.
        wanted: Function that selects files by their path.
        cached: Use the cache, which holds one selection per folder.
    """
    # An extra that is installed later changes which files are selected.
    place = os.fsencode(root.resolve()) + b"\0" + " ".join(sorted(SUFFIXES)).encode()
    memory = cache_folder() / "listing" / f"{hashlib.sha256(place).hexdigest()[:24]}.npz"
    remembered = _recall(root, memory) if cached else None
    if remembered:
        return remembered
    began, names, folders, ours = time.time_ns(), list[str](), list[str](), list[str]()
    kinds, first = Counter[str](), dict[str, str]()
    for folder, files, outputs in _walk(str(root), []):
        folders.append(os.path.relpath(folder, root))
        inside = "" if folders[-1] == "." else folders[-1].replace(os.sep, "/") + "/"
        ours += [inside + name for name in outputs]
        for name in files:
            path = f"{folder}{os.sep}{name}"
            if wanted(path):
                names.append(inside + name)
            else:
                kind = kind_of(name) or (".dcm" if looks_like_dicom(path) else "")
                kinds[kind] += 1
                first.setdefault(kind, path)
    names.sort()
    listing = Listing(Names.of(names), dict(kinds.most_common()), _collapse(ours, names), first)
    if cached and len(names) >= _REMEMBERED:
        _remember(listing, root, folders, began, memory)
    return listing


def _walk(folder: str, above: list[str]) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield each folder, in arbitrary order, with the names of its files and of the outputs in it."""
    files, below, signs = [], [], set[str]()
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name in SIGNS:
                signs.add(entry.name)
            if entry.name.startswith(".") or entry.name in JUNK:
                continue
            if entry.is_dir():
                below.append((entry.name, entry.path, entry.is_symlink()))
            else:
                files.append(entry.name)
    ours = recognise(folder, signs)
    # The folder that the user names is read even if it is an output.
    if ours.whole and above:
        yield folder, [], [""]
        return
    # Most folders hold no output. Skip the match there: over a million names, it takes a second.
    every = ours != Ours() or os.path.basename(folder) in SHEETS
    suspects = files if every else [name for name in files if name.startswith("search")]
    hidden = [name for name in suspects if ours.hides.fullmatch(name) or is_sheet(folder, name)]
    hidden_folders = {name for name, *_ in below if ours.hides.fullmatch(name)}
    if hidden:
        mine = set(hidden)
        files = [name for name in files if name not in mine]
    yield folder, files, [*hidden, *(f"{name}/" for name in hidden_folders)]
    here = [*above, os.path.realpath(folder)]
    for name, path, linked in below:
        # A link to one of its own parent folders would make the walk endless.
        if name not in hidden_folders and not (linked and os.path.realpath(path) in here):
            yield from _walk(path, here)


def _collapse(ours: Iterable[str], names: Sequence[str]) -> list[str]:
    """Replace outputs by their top-level folder, unless that holds images too."""
    tops: dict[str, None] = {}
    for path in ours:
        top = path.partition("/")[0] + "/" if "/" in path else path
        place = bisect_left(names, top)
        shared = top.endswith("/") and place < len(names) and names[place].startswith(top)
        tops[path if shared else top] = None
    return sorted(tops)


def _changes(root: Path, folders: Sequence[str]) -> NDArray[np.int64] | None:
    """Return when each folder last gained, lost or renamed a file; None if a folder is gone."""
    try:
        return np.array([os.stat(root / folder).st_mtime_ns for folder in folders], dtype=np.int64)
    except OSError:
        return None


def _recall(root: Path, memory: Path) -> Listing | None:
    try:
        with np.load(memory) as stored:
            folders = Names(stored["folder_text"], stored["folder_ends"])
            changes = _changes(root, folders)
            if changes is None or not np.array_equal(changes, stored["changes"]):
                return None
            kinds, ours = json.loads(stored["others"].tobytes())
            return Listing(Names(stored["text"], stored["ends"]), kinds, ours, {})
    # Whatever is wrong with the cache file, a new listing repairs it.
    except Exception:
        return None


def _remember(listing: Listing, root: Path, folders: list[str], began: int, memory: Path) -> None:
    changes = _changes(root, folders)
    if changes is None or changes.max() > began - _SETTLED:
        return
    where = Names.of(folders)
    try:
        with atomic(memory) as draft, draft.open("wb") as file:
            np.savez(
                file,
                text=listing.names.text,
                ends=listing.names.ends,
                others=np.frombuffer(json.dumps([listing.kinds, listing.ours]).encode(), np.uint8),
                folder_text=where.text,
                folder_ends=where.ends,
                changes=changes,
            )
    except OSError:
        pass  # an unwritable home only costs a new listing each time
