"""Gallery: all images of a folder of features, numbered across its splits; photos are read if still available."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from dinocli.core.atomic import write_text
from dinocli.core.errors import DinoError
from dinocli.core.tensors import Rows
from dinocli.data.decode.image import open_image
from dinocli.data.decode.pixels import BadImage, Data, Pixels
from dinocli.data.images import DEFAULTS, ImagesConfig
from dinocli.data.sources.open import Source, photo_files, splits
from dinocli.data.sources.parts import read_image
from dinocli.data.sources.photos import display_pixels
from dinocli.data.sources.regular import Refused
from dinocli.data.sources.shards import Shards, read_sample
from dinocli.features.store import Features, Provenance, read_splits, same_maker, subset


@dataclass(frozen=True)
class Gallery:
    """Images by row number.

    Attributes:
        parts: Features of each split, by name.
        data: Location of the images, as given to `dino extract` or as overridden.
    """

    folder: Path
    parts: dict[str, Features]
    data: str

    def __len__(self) -> int:
        return len(self.values)

    @cached_property
    def values(self) -> Rows:
        """Features of all splits, one after another. [S, D]"""
        return Rows([part.values for part in self.parts.values()])

    @property
    def provenance(self) -> Provenance:
        """Provenance of the features; all splits share it, except for the views."""
        return next(iter(self.parts.values())).provenance

    @property
    def digest(self) -> str:
        """Text that identifies the images and their order, but not the feature values."""
        return f"{self.provenance.fingerprint} {[(name, len(part)) for name, part in self.parts.items()]}"

    def name(self, row: int) -> str:
        """Return the path of an image, with its split in front if there are several."""
        split, path = self._locate(row)
        return path if len(self.parts) == 1 else f"{split}/{path}"

    def label(self, row: int) -> str | None:
        """Return the class of an image, or None."""
        split, _ = self._locate(row)
        part = self.parts[split]
        label = int(part.labels[row - self._begins[split]])
        return part.classes[label] if 0 <= label < len(part.classes) else None

    def file(self, row: int) -> Path | None:
        """Return the file of an image, or None if the image has no file of its own or is missing."""
        split, path = self._locate(row)
        source = self._sources.get(split)
        if source is None or isinstance(source, Shards) or not source.in_files:
            return None
        return (source.root / path).absolute()

    def read(self, row: int, images: ImagesConfig = DEFAULTS) -> Data | BadImage:
        """Return an image's bytes, or the reason why it cannot be read; `images` holds the limits."""
        split, path = self._locate(row)
        source = self._sources.get(split)
        if source is None:
            return BadImage(f"missing: {self._missing or f'{self.data} has no split {split}'}")
        try:
            if isinstance(source, Shards):
                return read_sample(source, path) or BadImage(f"missing: {path} is not in {source.where}")
            if source.in_files:
                return read_image(source.root / path, images)
            place = source.places.get(path)
            return (
                BadImage(f"missing: {path} is not in {source.where}") if place is None else source.read(place, images)
            )
        except Refused as error:
            return BadImage(str(error))
        except (OSError, ValueError, IndexError) as error:
            return BadImage(f"missing: {getattr(error, 'strerror', None) or error}")

    def photo(self, row: int, side: int, images: ImagesConfig = DEFAULTS) -> Pixels | BadImage:
        """Return an image, reduced to no less than `side` pixels, or the reason why it cannot be read. [H, W, C]"""
        data = self.read(row, images)
        return data if isinstance(data, BadImage) else display_pixels(data, side, images)

    def size(self, row: int, images: ImagesConfig = DEFAULTS) -> tuple[int, int]:
        """Return the number of pixels and of bytes of an image, from its header; zeros if it cannot be read."""
        data = self.read(row, images)
        opened = data if isinstance(data, BadImage) else open_image(data, images)
        if isinstance(opened, BadImage):
            return 0, 0
        return opened.height * opened.width, len(data) if isinstance(data, bytes) else 0

    def _locate(self, row: int) -> tuple[str, str]:
        split = [name for name, begin in self._begins.items() if begin <= row and len(self.parts[name])][-1]
        return split, self.parts[split].paths[row - self._begins[split]]

    @cached_property
    def _begins(self) -> dict[str, int]:
        ends = np.cumsum([0, *(len(part) for part in self.parts.values())]).tolist()
        return dict(zip(self.parts, ends, strict=False))

    @cached_property
    def _opened(self) -> tuple[dict[str, Source], str]:
        try:
            return splits(self.data, several=True), ""
        except DinoError as error:
            return {}, error.message

    @property
    def _sources(self) -> dict[str, Source]:
        return self._opened[0]

    @property
    def _missing(self) -> str:
        return self._opened[1]


def open_gallery(folder: Path, data: str | None = None) -> Gallery:
    """Open the images behind a folder of features.

    Args:
        folder: Output folder of `dino extract`.
        data: Current location of the images. If None, their location during `dino extract`.

    Raises:
        DinoError: If the folder holds no features, features that do not match, or patch tokens.
    """
    parts = read_splits(folder)
    if any(part.values.ndim != 2 for part in parts.values()):
        raise DinoError(
            f"{folder} holds patch tokens; expected one feature per image", "extract again with --tokens cls"
        )
    return Gallery(folder, parts, data or next(iter(parts.values())).provenance.data)


def among(gallery: Gallery, files: Path) -> Gallery:
    """Return the images of a gallery that are in a list of files, such as one saved by the page of `dino plot`.

    Args:
        gallery: Images with a file each.
        files: List of image files, or a folder of images.

    Raises:
        DinoError: If none of the files belongs to the gallery.
    """
    if not files.exists():
        raise DinoError(f"--among {files} does not exist; expected a list of image files", "check the path")
    wanted = {os.path.abspath(path) for path in photo_files(files)}
    parts, first = {}, 0
    for name, part in gallery.parts.items():
        kept = [row for row in range(len(part)) if str(gallery.file(first + row)) in wanted]
        if kept:
            parts[name] = subset(part, np.array(kept))
        first += len(part)
    if not parts:
        raise DinoError(
            f"none of the {len(wanted)} images of {files} is in {gallery.folder}",
            "name their current folder with --data",
        )
    return Gallery(gallery.folder, parts, gallery.data)


def belong_together(first: Gallery, other: Gallery) -> None:
    """Check that the features of two galleries can be compared.

    Raises:
        DinoError: If they were made by different weights or settings.
    """
    same_maker((str(first.folder), first.provenance), (str(other.folder), other.provenance))


def write_list(gallery: Gallery, rows: Sequence[int], path: Path) -> list[str]:
    """Write a list of image files for `dino pretrain`, with absolute paths.

    Returns:
        Names of omitted images: a list cannot hold paths with a tab or a line break.

    Raises:
        DinoError: If the images are not in separate files, or no longer there.
    """
    files = [gallery.file(row) for row in rows]
    if not all(files):
        raise DinoError(
            f"the images of {gallery.folder} are in {gallery.data}, which has no image files to list",
            "name their current folder with --data",
        )
    lines = [(row, str(file)) for row, file in zip(rows, files, strict=True)]
    omitted = {row for row, line in lines if any(mark in line for mark in "\t\r\n")}
    write_text(path, "".join(f"{line}\n" for row, line in lines if row not in omitted))
    return [gallery.name(row) for row in sorted(omitted)]
