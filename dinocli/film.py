"""Film: pictures of one size, one after another, as a GIF or an MP4, or side by side as a strip."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.GifImagePlugin import getdata

from dinocli.atomic import atomic
from dinocli.data.decode import Pixels
from dinocli.data.frames import pyav
from dinocli.picture import Panel, sheet

SHOWN = 8  # of a strip
_COLUMNS = 4


def shown(frames: int, most: int = SHOWN) -> list[int]:
    """The frames of a strip: the first, the last, and as many between them, evenly spread."""
    return sorted({round(at) for at in np.linspace(0, frames - 1, min(frames, most))}) if frames else []


def small(picture: Pixels, width: int) -> Pixels:
    """A picture at most so wide, in its own shape. [H, W, 3]"""
    height, whole = picture.shape[:2]
    if whole <= width:
        return picture
    size = (width, max(1, round(height * width / whole)))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))


def write_strip(panels: Sequence[Panel], path: Path) -> None:
    """Write pictures of one size with their captions, in rows, as a PNG."""
    rows = [panels[first : first + _COLUMNS] for first in range(0, len(panels), _COLUMNS)]
    with atomic(path) as draft:
        sheet(rows).save(draft, format="PNG", optimize=True)


def few_colors(frame: Pixels) -> Image.Image:
    """A picture in 256 colors of its own. [H, W, 3]"""
    # Without dithering: dots that change from frame to frame are seen more than steps between colors.
    return Image.fromarray(frame).quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)


def write_gif(
    frames: Iterable[Pixels],
    path: Path,
    per_second: float | Fraction,
    colors: Callable[[Pixels], Image.Image] = few_colors,
) -> int:
    """Write an animated GIF that goes on for ever, holding one frame at a time however many come.

    Args:
        frames: Of one size. [H, W, 3] each
        path: The file; it is not there where no frame came.
        per_second: Frames. The format counts in hundredths of a second, and browsers show nothing faster than 50.
        colors: Makes a picture with a palette of a frame; each has one of its own in the file.

    Returns:
        How many frames came.
    """
    # Pillow's own writer of many frames keeps all of them until the last has come.
    lasts = 10 * max(2, round(100 / per_second))  # ms
    count = 0
    coming = iter(frames)
    first = next(coming, None)
    if first is None:
        return 0
    with atomic(path) as draft, draft.open("wb") as file:
        head = BytesIO()
        colors(first).save(head, format="GIF", duration=lasts, loop=0, optimize=False)
        file.write(head.getvalue().removesuffix(b";"))
        for count, frame in enumerate(coming, 1):  # noqa: B007
            file.writelines(getdata(colors(frame), duration=lasts, include_color_table=True))
        file.write(b";")
    return count + 1


def write_mp4(frames: Iterable[Pixels], path: Path, per_second: Fraction) -> None:
    """Write a video that every player knows, a frame at a time.

    Args:
        frames: Of one size, with even sides. [H, W, 3] each
        path: The file.
        per_second: Frames.

    Raises:
        DinoError: The package av is not there.
    """
    av = pyav()
    with atomic(path) as draft, av.open(str(draft), "w", format="mp4", options={"movflags": "faststart"}) as file:
        stream: Any = None
        for frame in frames:
            if stream is None:
                stream = file.add_stream("libx264" if "libx264" in av.codecs_available else "mpeg4", rate=per_second)
                stream.height, stream.width = frame.shape[:2]
                stream.pix_fmt = "yuv420p"
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
