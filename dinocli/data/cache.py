"""Decoded images kept for the epochs to come, in memory or in a file that all workers share."""

from __future__ import annotations

import math
import mmap
import multiprocessing
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinocli.data.crops import ViewConfig, shrink
from dinocli.data.decode import Pixels
from dinocli.distributed import local_size
from dinocli.errors import DinoError
from dinocli.resources import ram_of

_SHARE = {"ram": 0.5, "disk": 0.9}  # of what is free
_NO_RESERVE = 0x4000  # Linux: take memory when it is written to, and not before


def kept_side(views: Sequence[ViewConfig]) -> int:
    """The short side at which the smallest crop of each view still has as many pixels as it is resized to."""
    return max(math.ceil(view.size / math.sqrt(view.scale[0])) for view in views)


class PixelCache:
    """Pixels of images by their number, small enough that no crop of the recipe is enlarged by it.

    Each process of a run keeps what it sees itself.

    What does not fit is decoded each time, made as small all the same: so the views of a run do not depend on how much
    fitted. The memory or file is gone when the run ends.

    Args:
        images: How many there are.
        views: Whose crops are to be cut.
        where: `ram`, or a folder for the file.
        channels: C of every image.

    Raises:
        DinoError: Processes here cannot share it, or the folder cannot be written to.
    """

    def __init__(self, images: int, views: Sequence[ViewConfig], where: str, channels: int = 3) -> None:
        if sys.platform != "linux":
            raise DinoError("--cache needs Linux, where worker processes share memory as it stands", "leave it out")
        self.side, self._channels = kept_side(views), channels
        self._memory, self._budget = _memory(where)
        self._next: Any = multiprocessing.get_context("fork").Value("q", 0)
        # Where each image lies, plus one, and its height and width; of anonymous memory that starts as zeros.
        table = mmap.mmap(-1, max(1, 8 * images * 3))
        self._table: NDArray[np.int64] = np.frombuffer(table, dtype=np.int64, count=images * 3).reshape(images, 3)

    @property
    def kept(self) -> int:
        """How many images are in it."""
        return int((self._table[:, 0] > 0).sum())

    def get(self, row: int) -> Pixels | None:
        """The pixels of an image, if they are kept. [H, W, C]"""
        place, height, width = self._table[row].tolist()
        if not place:
            return None
        shape = (height, width, self._channels)
        return np.frombuffer(self._memory, np.uint8, count=math.prod(shape), offset=place - 1).reshape(shape)

    def put(self, row: int, pixels: Pixels) -> Pixels:
        """Keep an image, if there is room; what is to be cut from in its place. [H, W, C]"""
        pixels = shrink(pixels, self.side)
        with self._next.get_lock():
            place = self._next.value
            if place + pixels.nbytes > self._budget:
                return pixels
            self._next.value += pixels.nbytes
        self._memory[place : place + pixels.nbytes] = pixels.tobytes()
        self._table[row, 1:] = pixels.shape[:2]
        self._table[row, 0] = place + 1  # last: whoever sees it sees the pixels
        return pixels


def _memory(where: str) -> tuple[mmap.mmap, int]:
    if where == "ram":
        free, _ = ram_of()  # of a container too: what is above its limit ends the run
        budget = int(_SHARE["ram"] * free / local_size())
        return mmap.mmap(-1, budget, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | _NO_RESERVE), budget
    folder = Path(where)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        budget = int(_SHARE["disk"] * shutil.disk_usage(folder).free / local_size())
        with tempfile.TemporaryFile(dir=folder) as file:  # without a name, so that nothing is left of it
            file.truncate(budget)
            return mmap.mmap(file.fileno(), budget), budget
    except OSError as error:
        raise DinoError(
            f"--cache {where} cannot be written to: {error.strerror}", "--cache ram, or another folder"
        ) from error
