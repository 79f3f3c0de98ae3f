"""Films: pictures of one size, written as a GIF, an MP4 or a strip."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.GifImagePlugin import getdata

from dinocli.core.atomic import atomic
from dinocli.data.decode.pixels import Pixels
from dinocli.data.decode.video import usual_matrix
from dinocli.data.sources.frames import pyav
from dinocli.viz.picture import Tile, sheet

SHOWN = 8  # frames in a strip
_COLUMNS = 4


def shown(frames: int, most: int = SHOWN) -> list[int]:
    """Return the frame numbers of a strip: the first, the last, and evenly spaced ones between."""
    return sorted({round(at) for at in np.linspace(0, frames - 1, min(frames, most))}) if frames else []


def small(picture: Pixels, width: int) -> Pixels:
    """Shrink a picture to a maximum width, keeping its aspect ratio. [H, W, 3]"""
    height, full_width = picture.shape[:2]
    if full_width <= width:
        return picture
    size = (width, max(1, round(height * width / full_width)))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))


def write_strip(tiles: Sequence[Tile], path: Path) -> None:
    """Write pictures of one size with their captions, in rows, as a PNG."""
    rows = [tiles[first : first + _COLUMNS] for first in range(0, len(tiles), _COLUMNS)]
    with atomic(path) as draft:
        sheet(rows).save(draft, format="PNG", optimize=True)


def few_colors(frame: Pixels) -> Image.Image:
    """Reduce a picture to a palette of 256 colors. [H, W, 3]"""
    # No dithering: dots that flicker between frames are more visible than color banding.
    return Image.fromarray(frame).quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)


def write_gif(
    frames: Iterable[Pixels],
    path: Path,
    per_second: float | Fraction,
    colors: Callable[[Pixels], Image.Image] = few_colors,
) -> int:
    """Write an endless GIF, with one frame in memory at a time.

    Args:
        frames: Frames of one size. [H, W, 3] each
        path: Output file, not written if there are no frames.
        per_second: Frame rate. GIF stores durations in hundredths of a second, and browsers show at most 50
            frames per second.
        colors: Function that reduces a frame to a palette; each frame is stored with its own palette.

    Returns:
        Number of frames.
    """
    # Pillow's own writer keeps all frames in memory until the last one.
    duration = 10 * max(2, round(100 / per_second))  # ms
    count = 0
    remaining = iter(frames)
    first = next(remaining, None)
    if first is None:
        return 0
    with atomic(path) as draft, draft.open("wb") as file:
        head = BytesIO()
        colors(first).save(head, format="GIF", duration=duration, loop=0, optimize=False)
        file.write(head.getvalue().removesuffix(b";"))
        for count, frame in enumerate(remaining, 1):  # noqa: B007
            file.writelines(getdata(colors(frame), duration=duration, include_color_table=True))
        file.write(b";")
    return count + 1


def write_mp4(frames: Iterable[Pixels], path: Path, per_second: Fraction) -> None:
    """Write an MP4 that every player can open, with one frame in memory at a time.

    Args:
        frames: Frames of one size, with even sides. [H, W, 3] each
        path: Output file.
        per_second: Frame rate.

    Raises:
        DinoError: If the package av is not installed.
    """
    av = pyav()
    module: Any = import_module("av.video.reformatter")
    reformatter = module.VideoReformatter()
    with atomic(path) as draft, av.open(str(draft), "w", format="mp4", options={"movflags": "faststart"}) as file:
        stream: Any = None
        for frame in frames:
            if stream is None:
                stream = file.add_stream("libx264" if "libx264" in av.codecs_available else "mpeg4", rate=per_second)
                stream.height, stream.width = frame.shape[:2]
                stream.pix_fmt = "yuv420p"
                # Stated, and the one that players assume anyway: MPEG-4 Part 2 does not state it.
                matrix = usual_matrix(stream.width, stream.height)
                stream.codec_context.colorspace = matrix
            rgb = av.VideoFrame.from_ndarray(frame, format="rgb24")
            yuv = reformatter.reformat(rgb, format="yuv420p", dst_colorspace=module.Colorspace(matrix))
            file.mux(stream.encode(yuv))
        file.mux(stream.encode())
