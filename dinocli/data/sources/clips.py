"""Clips: the frames of one video that are near each other in time."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from dinocli.core.errors import DinoError
from dinocli.data.sources.indexed import Images
from dinocli.data.sources.parts import part_of
from dinocli.data.sources.shards import Shards

_SLACK = 1.5e-3  # seconds; names round times to thousandths, so a difference may be off by one


class Clips:
    """Frames of videos among the images of a source, sorted by file and time.

    They take 24 bytes per frame, which worker processes share.

    Args:
        names: Names of all images of the source.
        within: Longest time between two frames of a pair, in seconds.

    Attributes:
        frames: Number of images that are frames of a video.
        alone: Number of images without another frame in reach, photos included.
    """

    def __init__(self, names: Sequence[str], within: float) -> None:
        self._reach = within + _SLACK
        rows, files, times = array("q"), array("q"), array("d")  # lists of numbers would take five times the memory
        numbers: dict[str, int] = {}
        for row, name in enumerate(names):
            part = part_of(name)
            time = _seconds(part.value) if part and part.kind == "time" else math.nan
            if part and math.isfinite(time):
                rows.append(row)
                files.append(numbers.setdefault(part.file, len(numbers)))
                times.append(time)
        self.frames = len(rows)
        # `_order` maps a place in the sorted frames to a number in `_rows`, and `_place` maps it back.
        self._rows = np.array(rows, np.int32 if len(names) < 2**31 else np.int64)
        self._order = np.lexsort((times, files)).astype(self._rows.dtype)
        self._place = np.empty_like(self._order)
        self._place[self._order] = np.arange(self.frames, dtype=self._order.dtype)
        self._files = np.array(files, np.int32)[self._order]
        self._times = np.array(times)[self._order]
        self.alone = len(names) - self._count_paired()

    def other(self, row: int, generator: np.random.Generator) -> int:
        """Return one of the other frames of an image's video that are in reach, all equally probable.

        Args:
            row: Index of the image in the source.
            generator: Source of the random choice.

        Returns:
            Index of the other frame. The image's own index if it is no frame, or there is no other.
        """
        # A Python number would be int64, and NumPy would convert the whole array to it in each search.
        number = int(np.searchsorted(self._rows, self._rows.dtype.type(row)))
        if number == self.frames or self._rows[number] != row:
            return row
        place = int(self._place[number])
        file, time = self._files[place], self._times[place]
        first, end = int(np.searchsorted(self._files, file)), int(np.searchsorted(self._files, file, "right"))
        times = self._times[first:end]
        low = first + int(np.searchsorted(times, time - self._reach))
        high = first + int(np.searchsorted(times, time + self._reach, "right"))
        # A source may hold a frame several times. A copy of the same frame is no other frame.
        own, after = first + int(np.searchsorted(times, time)), first + int(np.searchsorted(times, time, "right"))
        count = own - low + high - after
        if not count:
            return row
        chosen = low + int(generator.integers(count))
        return int(self._rows[self._order[chosen if chosen < own else chosen + after - own]])

    def _count_paired(self) -> int:
        """Return the number of images with another frame in reach."""
        new = np.ones(self.frames, bool)  # True at the first of equal frames
        new[1:] = (np.diff(self._files) != 0) | (np.diff(self._times) != 0)
        files, times, copies = self._files[new], self._times[new], np.diff(np.flatnonzero(np.append(new, True)))
        near = (np.diff(files) == 0) & (np.diff(times) < self._reach)
        return int(copies[np.append(False, near) | np.append(near, False)].sum()) if len(copies) else 0


def _seconds(value: str) -> float:
    """Return the time in a frame's name; nan if it is no number, which only a list of files may contain."""
    try:
        return float(value)
    except ValueError:
        return math.nan


def clips_of(source: Images | Shards, within: float) -> Clips:
    """Return the clips of a source.

    Args:
        source: Images, some or all of them frames of videos.
        within: Longest time between two frames of a pair, in seconds.

    Raises:
        DinoError: If the source is a stream, or no image has another frame in reach.
    """
    if isinstance(source, Shards):
        raise DinoError(
            f"images.pair_within needs random access to frames of videos; {source.where} is read as a stream",
            "name a folder or a list of videos, or --set images.pair_within=none",
        )
    clips = _read_names(source, within)
    if clips.alone == len(source):
        remedy = "a larger images.pair_within" if clips.frames else "name a folder or a list of videos"
        raise DinoError(
            f"images.pair_within={within:g}: no image in {source.where} has another frame within {within:g} seconds; "
            f"{clips.frames} of {len(source)} images are frames of videos",
            f"{remedy}, or --set images.pair_within=none",
        )
    return clips


@lru_cache(1)  # the plan and the loader of a run both need them, and a million names take two seconds
def _read_names(source: Images, within: float) -> Clips:
    return Clips(source.names, within)
