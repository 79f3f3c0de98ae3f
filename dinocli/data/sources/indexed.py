"""Images with random access by index, each read on its own."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinocli.data.decode.pixels import Data
from dinocli.data.images import DEFAULTS, ImagesConfig
from dinocli.data.sources.listing import Names
from dinocli.data.sources.parts import read_image


@dataclass(frozen=True, eq=False)
class Images:
    """Images with random access by index.

    Attributes:
        where: Source as the user named it.
        root: Folder that the names are relative to.
        names: File names relative to `root`, with `/` between folders.
        classes: Class names; empty for unlabelled images.
        labels: Class index per image, -1 if unlabelled. [S]
        notes: Messages for the user about files that are not read.
        clash: First image with two labels in a list, and both labels, in words; empty if there is none. The class of
            an image with several labels is all of them, separated by `;`.
        metadata: Further columns of a list, by name, with a text per image.
        held: True if some names are of files that hold images only by a setting; see `within`.
    """

    where: str
    root: Path
    names: Names
    classes: list[str]
    labels: NDArray[np.int32]
    notes: tuple[str, ...] = field(default=(), kw_only=True)
    clash: str = field(default="", kw_only=True)
    metadata: Mapping[str, Sequence[str]] = field(default_factory=dict, kw_only=True)
    held: bool = field(default=False, kw_only=True)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def count(self) -> int:
        """Number of images. The same property of `Shards` may be None."""
        return len(self.names)

    @property
    def in_files(self) -> bool:
        """True if each image is a file of its own, at `root / name`."""
        return True

    @cached_property
    def places(self) -> dict[str, int]:
        """Index of each image by its name."""
        return {name: index for index, name in enumerate(self.names)}

    @property
    def fingerprint(self) -> str:
        """Checksum of the names and their order, independent of the folder's location."""
        return f"{zlib.crc32(self.names.ends.tobytes(), zlib.crc32(self.names.text.tobytes())):08x}"

    def read(self, index: int, images: ImagesConfig = DEFAULTS) -> Data:
        """Return the bytes of a file, or one of several images in it.

        Args:
            index: Index of the image.
            images: Limits; larger files are not read.

        Raises:
            OSError: If the file no longer exists, is too large or not a regular file, or permission is denied.
        """
        return read_image(os.path.join(self.root, self.names[index]), images)

    @property
    def mixture(self) -> list[tuple[range, float]]:
        """Rows and share of an epoch of each source that is joined by shares; else empty."""
        return []

    @property
    def blocks(self) -> tuple[NDArray[np.int64], int] | None:
        """Ends of runs of rows that are read together [G], and number of runs to shuffle together; else None."""
        return None

    def peers(self, index: int) -> range:
        """Return the rows from which to draw a replacement of an unreadable image."""
        return range(len(self))

    def take(self, rows: NDArray[np.int64]) -> Images:
        """Return a source of some of the images, in this order; an image may be taken several times."""
        names, *columns = ([each[i] for i in rows.tolist()] for each in (self.names, *self.metadata.values()))
        metadata = dict(zip(self.metadata, map(Names.of, columns), strict=True))
        rest = self.classes, self.labels[rows], self, rows
        return TakenImages(self.where, self.root, Names.of(names), *rest, notes=self.notes, metadata=metadata)

    def below(self, folder: str, rows: NDArray[np.int64]) -> Images:
        """Return the images in a top folder, `rows`, as a source of their own, in which the names start below it."""
        texts = [self.names[i].removeprefix(f"{folder}/") for i in rows.tolist()]
        where, root = f"{self.where}/{folder}", self.root / folder
        return TakenImages(where, root, Names.of(texts), *folder_classes(texts), self, rows, notes=self.notes)


@dataclass(frozen=True, eq=False)
class StoredImages(Images):
    """Images that are no files of their own, such as those of an archive; a subclass reads them."""

    @property
    def in_files(self) -> bool:
        return False


@dataclass(frozen=True, eq=False)
class TakenImages(Images):
    """Some of the images of a source.

    Attributes:
        source: All images.
        rows: Index of each image in the source. [S]
    """

    source: Images
    rows: NDArray[np.int64]

    @property
    def in_files(self) -> bool:
        return self.source.in_files

    @property
    def fingerprint(self) -> str:
        """Checksum of the names, their order, the labels and the classes."""
        classes = "\0".join(self.classes).encode(errors="surrogateescape")
        return f"{zlib.crc32(self.labels.tobytes(), zlib.crc32(classes, int(super().fingerprint, 16))):08x}"

    def read(self, index: int, images: ImagesConfig = DEFAULTS) -> Data:
        return self.source.read(int(self.rows[index]), images)

    @property
    def blocks(self) -> tuple[NDArray[np.int64], int] | None:
        """Runs of the source without the other images; None if the order of the images interrupts a run."""
        if (blocks := self.source.blocks) is None:
            return None
        runs = np.searchsorted(blocks[0], self.rows, "right")
        ends = np.flatnonzero(np.diff(runs, append=-1)) + 1
        return (ends, blocks[1]) if len(ends) == len(np.unique(runs)) else None


def number_classes(labels: Sequence[str]) -> tuple[list[str], NDArray[np.int32]]:
    """Return the sorted class names and each image's index in them; if all names are numbers, sort by number."""
    numbers = all(label.isdecimal() for label in labels)
    classes = sorted(set(labels), key=(lambda label: (int(label), label)) if numbers else None)
    place = {name: i for i, name in enumerate(classes)}
    return classes, np.array([place[label] for label in labels], dtype=np.int32)


def number_labels(labels: Sequence[str | None]) -> tuple[list[str], NDArray[np.int32]]:
    """Return the classes of labels as `number_classes` does, and each image's index in them: -1 without a label."""
    classes, found = number_classes([label for label in labels if label is not None])
    numbers = np.full(len(labels), -1, dtype=np.int32)
    numbers[[i for i, label in enumerate(labels) if label is not None]] = found
    return classes, numbers


def label_fields(labels: Sequence[str]) -> dict[str, Any]:
    """Return `classes` and `labels` of `Images` for labels as text; an empty text is no label."""
    classes, numbers = number_labels([label or None for label in labels])
    return {"classes": classes, "labels": numbers}


def folder_classes(names: Sequence[str]) -> tuple[list[str], NDArray[np.int32]]:
    """Return the top folders of names as classes, and each name's index in them; no classes if a name has no folder."""
    tops = [name.split("/", 1)[0] if "/" in name else "" for name in names]
    return number_classes(tops) if all(tops) else ([], np.full(len(names), -1, dtype=np.int32))
