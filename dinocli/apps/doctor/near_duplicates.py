"""Near-duplicate images, found by comparing small thumbnails."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import faiss
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinocli.data.decode.pixels import Pixels

SIDE = 8  # pixels of a thumbnail
# Smallest cosine of near-duplicate thumbnails. Measured on 9,469 photos of Imagenette and 10,000 images of CIFAR-10.
# Recall: 99 % of copies as JPEG of quality 50, 100 % of copies at half size, 61 to 92 % of copies cropped by 2 % on
# each side, 38 % if cropped by 4 %. False pairs: 3 on Imagenette (a horizon below an empty sky). On CIFAR-10 it finds
# 18 pairs; by eye, all but one show the same car, cat or plane. Digits and printed pages are all similar by it.
LIKENESS = 0.97
_FLAT = 3  # levels of 255
_SHOWN = 5

Thumbnail = NDArray[np.float32]


@dataclass(frozen=True)
class Pair:
    """Two similar images, with the cosine of their thumbnails."""

    first: str
    second: str
    likeness: float


def thumbnail(pixels: Pixels) -> Thumbnail:
    """Average pixels to an 8x8 thumbnail. [8, 8, C], 0 to 255"""
    # Pillow supports few channel counts.
    parts = [pixels] if pixels.shape[2] == 3 else [np.ascontiguousarray(part) for part in np.moveaxis(pixels, 2, 0)]
    small = [Image.fromarray(part).resize((SIDE, SIDE), Image.Resampling.BOX) for part in parts]
    return np.dstack([np.asarray(part) for part in small]).astype(np.float32)


def is_flat(thumb: Thumbnail) -> bool:
    """Return True if an image has one color: without its mean, only noise would be left to compare."""
    return bool(np.ptp(thumb, axis=(0, 1)).max() < _FLAT)


def near_equal(names: Sequence[str], thumbs: Sequence[Thumbnail]) -> tuple[int, list[Pair]]:
    """Count the near-duplicates of an earlier image, and return the most similar pairs; flat images are skipped.

    All pairs are compared, exactly. Thumbnails are first normalized by mean color and contrast.
    """
    rows = [row for row, thumb in enumerate(thumbs) if not is_flat(thumb)]
    if not rows:
        return 0, []
    centered = np.stack([thumbs[row] - thumbs[row].mean(axis=(0, 1)) for row in rows]).reshape(len(rows), -1)
    centered /= np.linalg.norm(centered, axis=1, keepdims=True)
    index = faiss.IndexFlatIP(centered.shape[1])
    index.add(centered)
    ends, likeness, found = index.range_search(centered, LIKENESS)
    later = np.repeat(np.arange(len(rows)), np.diff(ends).astype(np.int64))
    below = found < later
    first, second, likeness = found[below], later[below], likeness[below]
    pairs = [
        Pair(names[rows[first[i]]], names[rows[second[i]]], min(1.0, float(likeness[i])))  # rounding may exceed 1
        for i in np.argsort(-likeness)[:_SHOWN].tolist()
    ]
    return len(np.unique(second)), pairs
