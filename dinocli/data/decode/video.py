"""Single frames of video files, at a time, without decoding from the start."""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import numpy as np
from PIL import Image

from dinocli.data.decode.guards import size_fault
from dinocli.data.decode.pixels import Pixels
from dinocli.data.decode.raster import UnfitArray
from dinocli.data.decode.turns import orientation_of, turned
from dinocli.data.images import ImagesConfig

_MICROSECONDS = 1_000_000  # the unit of a container's times
_SLACK = 1e-3  # seconds; times in names are rounded to this
_BT709, _BT601, _UNTAGGED = 1, 5, 2  # FFmpeg's numbers of color matrices; the last if a file states none


def orientation(frame: Any) -> int:
    """Return the EXIF orientation of a video frame. PyAV's `frame.rotation` ignores mirroring."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    return 1 if matrix is None else orientation_of(np.frombuffer(bytes(matrix), np.int32))


def usual_matrix(width: int, height: int) -> int:
    """Return FFmpeg's number of the color matrix that players assume for a video that states none.

    FFmpeg itself assumes BT.601 for every size.

    Source: mpv, mp_csp_guess_colorspace.
    """
    return _BT709 if width >= 1280 or height > 576 else _BT601


def upright_pixels(frame: Any) -> Pixels:
    """Return the pixels of a video frame, upright. [H, W, 3]"""
    module: Any = import_module("av.video.reformatter")
    reformatter, untagged = module.VideoReformatter(), frame.colorspace == _UNTAGGED
    matrix = module.Colorspace(usual_matrix(frame.width, frame.height)) if untagged else None
    # `frame.to_ndarray` alone would keep a reformatter with threads in the frame, and a frame is freed only by the
    # garbage collector, because its side data refer to it. In a process forked before that, freeing the threads hangs.
    pixels = reformatter.reformat(frame, format="rgb24", src_colorspace=matrix).to_ndarray()
    return turned(pixels, orientation(frame))


def frame_times(path: str, every: float) -> list[float]:
    """Return the times of a video at which frames are read, in seconds from its first frame.

    Args:
        path: Video file.
        every: Seconds between the frames.

    Raises:
        UnfitArray: If the file has no video stream, or states no duration.
    """
    with _open(path) as file:
        stream = _stream(file)
        if stream.duration:
            seconds = float(stream.duration * stream.time_base)
        elif file.duration:
            # Flash counts from zero, not from the first frame.
            late = file.start_time if file.format.name == "flv" else 0
            seconds = (file.duration - (late or 0)) / _MICROSECONDS
        else:
            raise UnfitArray("not read here: a video that states no duration; remux it, as with ffmpeg -c copy")
    # A frame lasts until the next one: the end itself shows nothing.
    return [number * every for number in range(max(1, math.ceil((seconds - _SLACK) / every)))]


def read_frame(path: str, time: float, images: ImagesConfig) -> Image.Image:
    """Read the frame that a video shows at a time, upright.

    A seek is checked: in MPEG-TS it may land after the time, or find no frame. Then the file is decoded from its start.

    Args:
        path: Video file.
        time: Seconds from the first frame.
        images: Limits.

    Raises:
        UnfitArray: If the file has no video stream, the frame is over the limits, or there is none.
    """
    for seek in (True, False):
        with _open(path) as file:
            stream = _stream(file)
            if fault := size_fault((stream.width, stream.height), images):
                raise UnfitArray(fault.reason)
            shown = _shown(_decode(file, stream, time, seek), time, stream)
            if shown is not None:
                return Image.fromarray(upright_pixels(shown))
    raise UnfitArray(f"no frame at {time:g} seconds")


def _open(path: str) -> Any:
    av: Any = import_module("av")
    try:
        return av.open(path)
    except av.error.FFmpegError as error:
        raise ValueError(f"not a video: {error.strerror}") from error


def _stream(file: Any) -> Any:
    stream = next(iter(file.streams.video), None)
    if stream is None:
        raise UnfitArray("no image: a file without a video stream")
    stream.codec_context.thread_count = 1  # the workers already use all cores
    return stream


def _decode(file: Any, stream: Any, time: float, seek: bool) -> Iterator[Any]:
    if seek:
        try:
            file.seek(int((stream.start_time or 0) + time / stream.time_base), stream=stream)
        except OSError:  # FFmpeg's errors are, and this container cannot seek
            return
    yield from file.decode(stream)


def _shown(frames: Iterator[Any], time: float, stream: Any) -> Any:
    """Return the last frame that begins by a time; None if the first one begins later."""
    until = (stream.start_time or 0) + (time + _SLACK) / stream.time_base
    shown = None
    for frame in frames:
        begins = frame.pts if frame.pts is not None else frame.dts
        if begins is not None and begins > until:
            break
        shown = frame
    return shown
