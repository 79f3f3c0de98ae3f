"""Frames: a film's pictures in order, from a folder, from files that were named, or out of a video file."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dinocli.data.decode import BadImage
from dinocli.data.images import DEFAULTS, ImagesConfig
from dinocli.data.regular import read_file, why_unread
from dinocli.data.sources import image_folder
from dinocli.data.turns import orientation_of, turned
from dinocli.errors import DinoError

_VIDEOS = frozenset(".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .ts .wmv .ogv".split())


class Frame(NamedTuple):
    """One of them.

    Attributes:
        number: From 0.
        name: Of its file, or its number from 1.
        data: Its file, its picture, or why there is none.
    """

    number: int
    name: str
    data: bytes | Image.Image | BadImage


@dataclass(frozen=True)
class Frames:
    """Frames as files.

    Attributes:
        where: What they are told by: their folder, or the video.
        files: They, in order.
    """

    where: Path
    files: Sequence[Path]

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.files)

    @property
    def rate(self) -> Fraction | None:
        """How many a second; files do not tell."""
        return None

    def read(self, wanted: Container[int], images: ImagesConfig = DEFAULTS) -> Iterator[Frame]:
        """The frames of some numbers, in order."""
        for number, path in enumerate(self.files):
            if number in wanted:
                yield Frame(number, path.name, _read(path, images))


@dataclass(frozen=True)
class VideoFrames(Frames):
    """Frames of a video file, decoded one after another each time they are gone through.

    Attributes:
        told: How many there are, as the file tells.
        pace: How many a second.
    """

    told: int = 0
    pace: Fraction | None = None

    @property
    def count(self) -> int:
        return self.told

    @property
    def rate(self) -> Fraction | None:
        return self.pace

    def read(self, wanted: Container[int], images: ImagesConfig = DEFAULTS) -> Iterator[Frame]:
        av, number = pyav(), -1
        with av.open(str(self.where)) as file:
            try:
                for number, frame in enumerate(file.decode(video=0)):
                    if number in wanted:
                        pixels = turned(frame.to_ndarray(format="rgb24"), _orientation(frame))
                        yield Frame(number, f"frame {number + 1}", Image.fromarray(pixels))
            except av.error.FFmpegError as error:
                reason = f"damaged: {error.strerror}; nothing after it is read"
                yield Frame(number + 1, f"frame {number + 2}", BadImage(reason))


def _read(path: Path, images: ImagesConfig) -> bytes | BadImage:
    try:
        return read_file(path, images)
    except OSError as error:
        return BadImage(why_unread(error))


def _orientation(frame: Any) -> int:
    """Return the EXIF orientation of a film's picture. `frame.rotation` of PyAV leaves mirroring out."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    return 1 if matrix is None else orientation_of(np.frombuffer(bytes(matrix), np.int32))


def is_video(path: Path) -> bool:
    """Whether a file is a video by its name."""
    return path.suffix.lower() in _VIDEOS


def open_frames(path: Path) -> Frames:
    """The frames of a folder, by name with numbers in them as numbers; or of a video.

    Raises:
        DinoError: There are none, they lie in several folders, or a video cannot be read here.
    """
    if path.is_file():
        return _open_video(path)
    names = image_folder(path).names
    below = next((name.rsplit("/", 1)[0] for name in names if "/" in name), None)
    if below:
        raise DinoError(f"one folder of frames was wanted; {path} holds others", f"name one: {path / below}")
    return Frames(path, [path / name for name in sorted(names, key=_by_number)])


def _by_number(name: str) -> list[tuple[int, str]]:
    """The order in which frame_2 comes before frame_10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _open_video(path: Path) -> VideoFrames:
    av = pyav()
    try:
        with av.open(str(path)) as file:
            stream = next(iter(file.streams.video), None)
            if stream is None:
                raise DinoError(f"a video was wanted; {path} has no pictures", "check that file")
            rate = stream.average_rate or stream.guessed_rate
            # Some kinds do not tell; their packets are counted, which decodes nothing.
            count = stream.frames or sum(1 for packet in file.demux(stream) if packet.size)
    except av.error.FFmpegError as error:
        raise DinoError(f"{path} cannot be read as a video: {error.strerror}", "a folder of its frames") from error
    return VideoFrames(path, (), count, rate)


def pyav() -> Any:
    """The package that reads and writes video files.

    Raises:
        DinoError: It is not there.
    """
    try:
        import av
    except ImportError as error:
        hint = "pip install 'dinocli[video]'; a folder of frames, and --film strip or gif, do without"
        raise DinoError("video files need the package av", hint) from error
    return av
