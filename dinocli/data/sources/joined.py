"""Several sources as one, with all images of each or with a share of each epoch."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dinocli.data.decode.pixels import Data
from dinocli.data.images import DEFAULTS, ImagesConfig
from dinocli.data.sources.indexed import Images, number_classes
from dinocli.data.sources.listing import Names


@dataclass(frozen=True, eq=False)
class JoinedImages(Images):
    """Images of several sources, one source after another.

    Attributes:
        parts: Sources.
        ends: Number of images in all sources up to each one. [P]
        shares: Share of each source in an epoch; they sum to 1. If None, an epoch has each image once.
    """

    parts: Sequence[Images]
    ends: NDArray[np.int64]
    shares: tuple[float, ...] | None

    @property
    def in_files(self) -> bool:
        return all(part.in_files for part in self.parts)

    @property
    def fingerprint(self) -> str:
        """Checksum of the sources' fingerprints and shares."""
        shares = [round(share, 9) for share in self.shares or ()]
        return f"{zlib.crc32(repr(([part.fingerprint for part in self.parts], shares)).encode()):08x}"

    def read(self, index: int, images: ImagesConfig = DEFAULTS) -> Data:
        part = int(np.searchsorted(self.ends, index, "right"))
        return self.parts[part].read(index - self._range(part).start, images)

    @property
    def mixture(self) -> list[tuple[range, float]]:
        return [(self._range(part), share) for part, share in enumerate(self.shares or ())]

    @property
    def blocks(self) -> tuple[NDArray[np.int64], int] | None:
        """Runs of all parts. Each image of a part without runs is a run of its own."""
        parts = [part.blocks for part in self.parts]
        if not any(parts):
            return None
        ends = [
            self._range(part).start + (blocks[0] if blocks else np.arange(1, len(self.parts[part]) + 1))
            for part, blocks in enumerate(parts)
        ]
        return np.concatenate(ends), min(blocks[1] for blocks in parts if blocks)

    def peers(self, index: int) -> range:
        return self._range(int(np.searchsorted(self.ends, index, "right"))) if self.shares else range(len(self))

    def _range(self, part: int) -> range:
        return range(int(self.ends[part - 1]) if part else 0, int(self.ends[part]))


def join_images(where: str, parts: Sequence[Images], weights: Sequence[float] | None = None) -> JoinedImages:
    """Join sources with random access. Classes are joined by name, if all sources have some.

    Args:
        where: Sources as the user named them.
        parts: Sources.
        weights: Relative share of each source in an epoch. If None, an epoch has each image once.
    """
    names = [_full_name(part, name) for part in parts for name in part.names]
    classes, labels = list[str](), np.full(len(names), -1, np.int32)
    if all(part.classes for part in parts):
        classes, numbers = number_classes([name for part in parts for name in part.classes])
        first = np.cumsum([0, *(len(part.classes) for part in parts)])
        # The label -1, of an image without a class, selects the last number.
        maps = [np.append(numbers[begin:end], -1) for begin, end in pairwise(first)]
        labels = np.concatenate([new[part.labels] for new, part in zip(maps, parts, strict=True)]).astype(np.int32)
    shares = tuple(weight / sum(weights) for weight in weights) if weights else None
    notes = tuple(dict.fromkeys(note for part in parts for note in part.notes))
    if shares:
        counts = [
            f"{share:.3g} of each epoch from {len(part)} images of {part.where}"
            for share, part in zip(shares, parts, strict=True)
        ]
        notes = (*notes, "; ".join(counts))
    ends = np.cumsum([len(part) for part in parts])
    return JoinedImages(where, Path(), Names.of(names), classes, labels, parts, ends, shares, notes=notes)


def _full_name(part: Images, name: str) -> str:
    return os.path.join(part.root, name).removeprefix("./") if part.in_files else f"{part.where}/{name}"
