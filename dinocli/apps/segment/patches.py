"""Patch features and pixel classes of many photos, on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dinocli.apps.segment.pairs import Pairs
from dinocli.core.atomic import draft_folder
from dinocli.data.decode.pixels import Pixels
from dinocli.data.sources.label_maps import IGNORED
from dinocli.features.encoder import Encoder, NotFinite

_LARGEST = 65504  # largest float16


@dataclass(frozen=True)
class StoredPatches:
    """Patch features and pixel classes of photos in memory-mapped files, read on access.

    Attributes:
        values: Features of all patches, photo after photo. [P, D], float16
        truth: Classes of all pixels at the network's resolution, photo after photo. [pixels]
        grids: Rows and columns of each photo. [S, 2]
        patch: Side of a patch, in pixels.
        mean: Mean of the features. [D], float32
        std: Standard deviation of the features. [D], float32
        counts: Number of pixels per class. [256]
        skipped: Photos that cannot be used, with reasons.
    """

    values: NDArray[np.float16]
    truth: NDArray[np.uint8]
    grids: NDArray[np.int64]
    patch: int
    mean: NDArray[np.float32]
    std: NDArray[np.float32]
    counts: NDArray[np.int64]
    skipped: dict[str, str]

    def __len__(self) -> int:
        return len(self.grids)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return the features [rows, columns, D] and classes [rows * patch, columns * patch] of a photo."""
        rows, columns = self.grids[index].tolist()
        first, count = int(self.grids[:index].prod(1).sum()), rows * columns
        values = np.array(self.values[first : first + count], dtype=np.float32).reshape(rows, columns, -1)
        area = self.patch**2
        truth = np.array(self.truth[first * area : (first + count) * area], dtype=np.int64)
        return torch.from_numpy(values), torch.from_numpy(truth.reshape(rows * self.patch, columns * self.patch))


@contextmanager
def store_patches(
    encoder: Encoder,
    pairs: Pairs,
    folder: Path,
    *,
    short_side: int,
    report: Callable[[int, int], None] = lambda done, of: None,
) -> Iterator[StoredPatches]:
    """Compute patch features of photos and store them on disk until the context ends.

    Args:
        encoder: Frozen backbone.
        pairs: Photos and masks.
        folder: Path next to which the files are stored.
        short_side: Short side in pixels after resizing.
        report: Callback after each photo, with the number done and the total.
    """
    patch, width = encoder.backbone.patch_size, encoder.backbone.width
    grids, skipped = list[tuple[int, int]](), dict[str, str]()
    total, squares, counts = np.zeros(width), np.zeros(width), np.zeros(256, dtype=np.int64)
    with draft_folder(folder) as draft:
        with (draft / "values").open("wb") as values, (draft / "truth").open("wb") as truth:
            for done, photo in enumerate(pairs.masks, 1):
                read = pairs.read(photo, encoder.images)
                tokens = None if isinstance(read, str) else _encode(encoder, read[0], short_side)
                if isinstance(read, str) or tokens is None or isinstance(tokens, str):
                    skipped[str(photo)] = str(tokens or read)
                else:
                    rows, columns = tokens.shape[:2]
                    classes = _resize(read[1], rows * patch, columns * patch)
                    values.write(tokens.astype(np.float16).tobytes())
                    truth.write(classes.tobytes())
                    grids.append((rows, columns))
                    total += tokens.sum((0, 1), dtype=np.float64)
                    squares += np.square(tokens, dtype=np.float64).sum((0, 1))
                    counts += np.bincount(classes.ravel(), minlength=256)
                report(done, len(pairs.masks))
        patches = sum(rows * columns for rows, columns in grids)
        mean = total / max(1, patches)
        std = np.sqrt(np.maximum(squares / max(1, patches) - mean**2, 1e-12))
        counts[IGNORED] = 0
        yield StoredPatches(
            _open_memmap(draft / "values", np.dtype(np.float16)).reshape(patches, width),
            _open_memmap(draft / "truth", np.dtype(np.uint8)),
            np.array(grids, dtype=np.int64).reshape(-1, 2),
            patch,
            mean.astype(np.float32),
            std.astype(np.float32),
            counts,
            skipped,
        )


def _encode(encoder: Encoder, pixels: Pixels, short_side: int) -> NDArray[np.float32] | str:
    """Return a photo's patch features [rows, columns, D], or the reason why they cannot be stored."""
    try:
        tokens: NDArray[np.float32] = encoder.patches(encoder.photo(pixels, short_side))[0].cpu().numpy()
    except NotFinite as error:
        return error.reason
    largest = float(np.abs(tokens).max())
    return f"too large for float16: a patch value is {largest:.3g}" if largest > _LARGEST else tokens


def _resize(mask: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))


def _open_memmap(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)  # an empty file cannot be mapped
