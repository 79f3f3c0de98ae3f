"""Frames of a film, in order, from a folder, a list of files, or a video file."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from dinocli.core.errors import DinoError
from dinocli.data.decode.extras import VIDEO
from dinocli.data.decode.pixels import BadImage, Data
from dinocli.data.decode.video import upright_pixels
from dinocli.data.images import DEFAULTS, ImagesConfig
from dinocli.data.sources.open import image_folder
from dinocli.data.sources.regular import read_file, why_unread


class Frame(NamedTuple):
    """Frame of a film.

    Attributes:
        number: Index from 0.
        name: File name, or the frame number from 1.
        data: Bytes of the file, decoded picture, or the reason that it cannot be read.
    """

    number: int
    name: str
    data: Data | BadImage


@dataclass(frozen=True)
class Frames:
    """Frames as files.

    Attributes:
        where: Folder of the frames, or the video.
        files: Files of the frames, in order.
    """

    where: Path
    files: Sequence[Path]

    @property
    def count(self) -> int:
        """Number of frames."""
        return len(self.files)

    @property
    def rate(self) -> Fraction | None:
        """Frames per second; None for files."""
        return None

    def read(self, wanted: Container[int], images: ImagesConfig = DEFAULTS) -> Iterator[Frame]:
        """Yield the frames with the given numbers, in order."""
        for number, path in enumerate(self.files):
            if number in wanted:
                yield Frame(number, path.name, _read(path, images))


@dataclass(frozen=True)
class VideoFrames(Frames):
    """Frames of a video file, decoded sequentially on every pass.

    Attributes:
        listed: Number of frames, according to the file.
        pace: Frames per second.
    """

    listed: int = 0
    pace: Fraction | None = None

    @property
    def count(self) -> int:
        return self.listed

    @property
    def rate(self) -> Fraction | None:
        return self.pace

    def read(self, wanted: Container[int], images: ImagesConfig = DEFAULTS) -> Iterator[Frame]:
        av, number = pyav(), -1
        try:
            with av.open(str(self.where)) as file:
                for number, frame in enumerate(file.decode(video=0)):
                    if number in wanted:
                        pixels = upright_pixels(frame)
                        yield Frame(number, f"frame {number + 1}", Image.fromarray(pixels))
        except av.error.FFmpegError as error:
            # The file may also have been moved or cut short since `open_frames` read its header.
            fault = why_unread(error) if isinstance(error, OSError) else f"damaged: {error.strerror}"
            yield Frame(number + 1, f"frame {number + 2}", BadImage(f"{fault}; later frames are skipped"))


def _read(path: Path, images: ImagesConfig) -> bytes | BadImage:
    try:
        return read_file(path, images)
    except OSError as error:
        return BadImage(why_unread(error))


def is_video(path: Path) -> bool:
    """Return whether a file is a video, by its name."""
    return path.suffix.lower() in VIDEO.suffixes


def open_frames(path: Path) -> Frames:
    """Open the frames of a folder, sorted by name with numbers in numeric order, or of a video.

    Raises:
        DinoError: If there are no frames, they are in several folders, or a video cannot be read.
    """
    if path.is_file():
        return _open_video(path)
    names = image_folder(path).names
    below = next((name.rsplit("/", 1)[0] for name in names if "/" in name), None)
    if below:
        raise DinoError(f"{path} has subfolders of frames; expected one folder of frames", f"name one: {path / below}")
    return Frames(path, [path / name for name in sorted(names, key=_by_number)])


def _by_number(name: str) -> list[tuple[int, str]]:
    """Return a sort key that puts frame_2 before frame_10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _open_video(path: Path) -> VideoFrames:
    av = pyav()
    try:
        with av.open(str(path)) as file:
            stream = next(iter(file.streams.video), None)
            if stream is None:
                raise DinoError(f"{path} has no video stream; expected a video", "check that file")
            rate = stream.average_rate or stream.guessed_rate
            # Some formats state no frame count. Counting packets is fast, because it decodes nothing.
            count = stream.frames or sum(1 for packet in file.demux(stream) if packet.size)
    except av.error.FFmpegError as error:
        raise DinoError(f"{path} cannot be read as a video: {error.strerror}", "name a folder of its frames") from error
    return VideoFrames(path, (), count, rate)


def pyav() -> Any:
    """Import the package that reads and writes video files.

    Raises:
        DinoError: If the package is not installed.
    """
    try:
        import av
    except ImportError as error:
        hint = "pip install 'dinocli[video]', or use a folder of frames, and --film strip or gif"
        raise DinoError("video files need the package av, which is not installed", hint) from error
    return av
