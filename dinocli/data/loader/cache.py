"""Cache of decoded images for later epochs, in memory or in a file that all workers share."""

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

from dinocli.core.distributed import local_size
from dinocli.core.errors import DinoError
from dinocli.core.resources import ram_of
from dinocli.data.decode.pixels import Pixels
from dinocli.data.views.crops import ViewConfig, shrink

_SHARE = {"ram": 0.5, "disk": 0.9}  # of the free space
_NO_RESERVE = 0x4000  # Linux: allocate memory only when it is written to


def kept_side(views: Sequence[ViewConfig]) -> int:
    """Return the short side at which the smallest crop of each view still has as many pixels as its resized output."""
    return max(math.ceil(view.size / math.sqrt(view.scale[0])) for view in views)


class PixelCache:
    """Cache of pixels by image number, downscaled only so far that no crop of the recipe is enlarged.

    Each process of a run caches the images that it reads itself.

    Images that do not fit are decoded every time and downscaled to the same size. So the views of a run do not depend
    on the space in the cache. The memory or file is freed when the run ends.

    Args:
        images: Number of images.
        views: Views whose crops are cut.
        where: `ram`, or a folder for the file.
        channels: Number of channels C of every image.

    Raises:
        DinoError: If processes cannot share memory on this system, or the folder cannot be written to.
    """

    def __init__(self, images: int, views: Sequence[ViewConfig], where: str, channels: int = 3) -> None:
        if sys.platform != "linux":
            raise DinoError(f"--cache works only on Linux; this is {sys.platform}", "run without --cache")
        self.side, self._channels = kept_side(views), channels
        self._memory, self._budget = _memory(where)
        self._next: Any = multiprocessing.get_context("fork").Value("q", 0)
        # Offset plus one, height and width of each image; anonymous memory starts as zeros, which mean no image.
        table = mmap.mmap(-1, max(1, 8 * images * 3))
        self._table: NDArray[np.int64] = np.frombuffer(table, dtype=np.int64, count=images * 3).reshape(images, 3)

    @property
    def kept(self) -> int:
        """Number of cached images."""
        return int((self._table[:, 0] > 0).sum())

    def get(self, row: int) -> Pixels | None:
        """Return the cached pixels of an image, or None. [H, W, C]"""
        place, height, width = self._table[row].tolist()
        if not place:
            return None
        shape = (height, width, self._channels)
        return np.frombuffer(self._memory, np.uint8, count=math.prod(shape), offset=place - 1).reshape(shape)

    def put(self, row: int, pixels: Pixels) -> Pixels:
        """Cache an image if there is room, and return the downscaled pixels to cut crops from. [H, W, C]"""
        pixels = shrink(pixels, self.side)
        with self._next.get_lock():
            place = self._next.value
            if place + pixels.nbytes > self._budget:
                return pixels
            self._next.value += pixels.nbytes
        self._memory[place : place + pixels.nbytes] = pixels.tobytes()
        self._table[row, 1:] = pixels.shape[:2]
        self._table[row, 0] = place + 1  # last: a process that sees it also sees the pixels
        return pixels


def _memory(where: str) -> tuple[mmap.mmap, int]:
    if where == "ram":
        free, _ = ram_of()  # respects a container's limit, above which the run would be killed
        budget = int(_SHARE["ram"] * free / local_size())
        return mmap.mmap(-1, budget, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | _NO_RESERVE), budget
    folder = Path(where)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # At least a byte, because an empty file cannot be mapped.
        budget = max(1, int(_SHARE["disk"] * shutil.disk_usage(folder).free / local_size()))
        with tempfile.TemporaryFile(dir=folder) as file:  # has no name, so nothing remains on disk
            file.truncate(budget)
            return mmap.mmap(file.fileno(), budget), budget
    except OSError as error:
        raise DinoError(
            f"--cache {where} cannot be written to: {error.strerror}", "use --cache ram, or another folder"
        ) from error
