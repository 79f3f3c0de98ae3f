"""Listing: which files a folder of any depth holds; told quickly, in little memory, and remembered for large ones."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from dinocli.atomic import atomic

# What image files are called.
SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .tif .tiff .bmp .dib .gif .avif .jp2 .j2k .jpx .ppm .pgm .pbm .pnm .pfm "
    ".tga".split()
)
ARRAY = ".npy"  # an image too, where no other kind is there
_REMEMBERED = 20_000  # files; below, listing takes no time worth a file in the user's cache
_SETTLED = 2_000_000_000  # nanoseconds; a folder changed later than this may change again within one tick of its clock


class Names(Sequence[str]):
    """Many file names in one piece of memory: their bytes and eight more each, which worker processes share."""

    def __init__(self, text: NDArray[np.uint8], ends: NDArray[np.int64]) -> None:
        self.text, self.ends = text, ends

    @classmethod
    def of(cls, names: Sequence[str]) -> Names:
        """Put names together; they may hold any bytes that a file system allows."""
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
    """What was found below a folder.

    Attributes:
        names: Of the wanted files, in order, with `/` between folders.
        others: How many other files there are.
    """

    names: Names
    others: int


def list_files(root: Path, wanted: Callable[[str], bool]) -> Listing:
    """List the files below a folder, those behind links too; hidden ones are passed over.

    A long list is kept in the user's cache, and taken from there as long as no folder below has changed.

    Args:
        root: The folder.
        wanted: Tells by the path of a file whether it belongs in the list.
    """
    memory = cache_folder() / "listing" / f"{hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:24]}.npz"
    remembered = _remembered(root, memory)
    if remembered:
        return remembered
    began, names, folders, others = time.time_ns(), list[str](), list[str](), 0
    for folder, files in _walk(str(root), []):
        folders.append(os.path.relpath(folder, root))
        inside = "" if folders[-1] == "." else folders[-1].replace(os.sep, "/") + "/"
        for name in files:
            if wanted(f"{folder}{os.sep}{name}"):
                names.append(inside + name)
            else:
                others += 1
    names.sort()
    listing = Listing(Names.of(names), others)
    if len(names) >= _REMEMBERED:
        _remember(listing, root, folders, began, memory)
    return listing


def _walk(folder: str, above: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Folders in no order, each with the names of its files."""
    files, below = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                below.append((entry.path, entry.is_symlink()))
            else:
                files.append(entry.name)
    yield folder, files
    here = [*above, os.path.realpath(folder)]
    for path, linked in below:
        # A link to a folder that it lies in would make the walk endless.
        if not (linked and os.path.realpath(path) in here):
            yield from _walk(path, here)


def cache_folder() -> Path:
    """Where the tool keeps what it can make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dinocli"


def _changes(root: Path, folders: Sequence[str]) -> NDArray[np.int64] | None:
    """When each folder last got, lost or renamed a file; none where one is gone."""
    try:
        return np.array([os.stat(root / folder).st_mtime_ns for folder in folders], dtype=np.int64)
    except OSError:
        return None


def _remembered(root: Path, memory: Path) -> Listing | None:
    try:
        with np.load(memory) as stored:
            folders = Names(stored["folder_text"], stored["folder_ends"])
            changes = _changes(root, folders)
            if changes is None or not np.array_equal(changes, stored["changes"]):
                return None
            return Listing(Names(stored["text"], stored["ends"]), int(stored["others"]))
    # Whatever is wrong with what was kept, listing again mends it.
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
                others=np.int64(listing.others),
                folder_text=where.text,
                folder_ends=where.ends,
                changes=changes,
            )
    except OSError:
        pass  # a home that cannot be written to costs a listing each time, and nothing else
