"""Tar archives of images as they are: nothing is unpacked, and each image is read by its place in the file."""

from __future__ import annotations

import contextlib
import os
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dinocli.core.errors import DinoError
from dinocli.data.images import DEFAULTS, ImagesConfig
from dinocli.data.sources.indexed import StoredImages
from dinocli.data.sources.listing import SUFFIXES
from dinocli.data.sources.members import select_images
from dinocli.data.sources.regular import Refused, read_span
from dinocli.data.sources.samples import LABELS, read_once, why_refused
from dinocli.data.sources.tar import UNENDED, LocalTar, Span, Sparse, members

_SHARD = re.compile(r"(?<!\d)0\d+$")


@dataclass(frozen=True, eq=False)
class TarImages(StoredImages):
    """Images in a tar file.

    Attributes:
        table: Offset and size of each image. [S, 2]
        sparse: Images that are stored without their zeros, by index.
        labelled: True if members with labels belong to the images, which are not read.
    """

    table: NDArray[np.int64]
    sparse: dict[int, Sparse]
    labelled: bool

    @property
    def fingerprint(self) -> str:
        """Checksum of the names, their order, and the places in the archive."""
        return f"{zlib.crc32(self.table.tobytes(), int(super().fingerprint, 16)):08x}"

    def read(self, index: int, images: ImagesConfig = DEFAULTS) -> bytes:
        """Return the bytes of an image.

        Raises:
            Refused: If it is too large, or the archive is shorter than it was.
            OSError: If the archive cannot be read.
        """
        offset, size = self.table[index].tolist()
        content = self.sparse.get(index) or Span(str(self.root), offset, size)
        if reason := why_refused(content, images.max_megabytes * 1e6):
            raise Refused(reason)
        if isinstance(content, Span):
            return read_span(*content)
        data = read_once(content)
        if len(data) < content.size:
            raise Refused(f"truncated: {content.path} ends early")
        return data


def open_tar(path: Path) -> TarImages | None:
    """Open a tar file of images as a folder; None if it is a shard or has no image.

    A shard is numbered with leading zeros (`train-000.tar`), or holds labels (`KEY.cls`, `KEY.json`).
    """
    if _SHARD.search(path.stem):
        return None
    try:
        images = list_tar(path)
    except DinoError:  # the reader of shards reports damage and other kinds of files
        return None
    return None if images.labelled else images


def list_tar(path: Path) -> TarImages:
    """List the images of a tar file for random access.

    Raises:
        DinoError: If it holds no image.
    """
    found, labels, links = dict[str, Span | Sparse](), set[str](), list[str]()
    with contextlib.closing(LocalTar(str(path))) as tape:
        for name, content in members(tape):
            stem, suffix = os.path.splitext(name)
            if suffix.lower().removeprefix(".") in LABELS:
                labels.add(stem)
            elif isinstance(content, Span | Sparse):
                found[name] = content
            elif suffix.lower() in SUFFIXES:
                links.append(name)
    contents = list(found.values())

    def marker(row: int, most: int) -> bytes:
        return b"" if why_refused(contents[row], most) else read_once(contents[row])

    rows, names, classes, numbers, notes = select_images(str(path), list(found), marker)
    if tape.torn:
        notes += (f"{path} {tape.torn} after its first {len(rows)} images; the rest is not read",)
    elif not tape.ended:
        notes += (f"{path} is {UNENDED}: images may be missing",)
    if links:
        notes += (f"{len(links)} images are links to files outside {path} and are ignored, such as {links[0]}",)
    chosen = [contents[row] for row in rows.tolist()]
    places = [(content.offset, content.size) if isinstance(content, Span) else (0, content.size) for content in chosen]
    sparse = {row: content for row, content in enumerate(chosen) if isinstance(content, Sparse)}
    labelled = not labels.isdisjoint(os.path.splitext(name)[0] for name in found)
    table = np.array(places, np.int64)
    return TarImages(str(path), path, names, classes, numbers, table, sparse, labelled, notes=notes)
