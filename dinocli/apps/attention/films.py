"""Attention films: maps over the frames of a video, as a strip, a GIF or an MP4, on one color scale."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import IO, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinocli.core.atomic import atomic
from dinocli.core.errors import DinoError
from dinocli.data.decode.image import decode
from dinocli.data.decode.pixels import BadImage, Pixels
from dinocli.data.sources.frames import Frames, pyav
from dinocli.evals.attention import attention_maps, default_size
from dinocli.features.encoder import Encoder, NotFinite
from dinocli.viz.film import shown, write_gif, write_mp4
from dinocli.viz.picture import Tile, heat, sheet, visible

Form = Literal["strip", "gif", "mp4"]
ENDINGS: dict[Form, str] = {"strip": ".png", "gif": ".gif", "mp4": ".mp4"}
RATE = Fraction(24)  # default frames per second
# Largest width in pixels of the photo, and of its map.
_WIDTHS: dict[Form, int] = {"strip": 240, "gif": 320, "mp4": 960}
_MAP_COLORS = 96  # palette entries reserved for the map, of 256 in a GIF
Map = NDArray[np.float32]


@dataclass(frozen=True)
class Filmed:
    """Result of `film`.

    Attributes:
        path: GIF, MP4 or PNG.
        frames: Number of frames in the film.
        skipped: Name and reason of each frame that cannot be read, or whose size differs from the first.
    """

    path: Path
    frames: int
    skipped: dict[str, str]


def film(
    encoder: Encoder,
    frames: Frames,
    path: Path,
    form: Form,
    *,
    head: int | None = None,
    size: int | None = None,
    rate: Fraction | None = None,
    report: Callable[[int], None] = lambda frames: None,
) -> Filmed:
    """Write a film of frames next to the class token's attention in each.

    The film uses one head, or the mean of all, and one color scale, so that colors do not flicker. The scale spans the
    lowest value of all frames to the median of their highest values. Therefore, a first pass stores all maps in a
    temporary file, and a second pass draws the frames.

    Args:
        encoder: Encoder with a vision transformer.
        frames: Frames to show; a strip shows eight of them, evenly spaced.
        path: GIF, MP4 or PNG.
        form: `strip`, a PNG; `gif`; or `mp4`, which needs the package av.
        head: Number of the head, from 1. If None, the mean of all heads.
        size: Short side in pixels after resizing. If None, `default_size` of the encoder.
        rate: Frames per second. If None, the video's own rate, or 24.
        report: Progress callback with the number of frames processed.

    Raises:
        DinoError: If the head does not exist, the backbone has no attention, no frame can be read, or av is not
            installed.
        OSError: If the disk is full, or the path is not writable.
    """
    if form == "mp4":
        pyav()
    with tempfile.TemporaryFile() as store:
        layout = _compute_maps(encoder, frames, store, form, head=head, size=size, report=report)
        store.seek(0)
        drawn = _draw_frames(encoder, frames, store, layout, _WIDTHS[form])
        _WRITERS[form](drawn, path, rate or frames.rate or RATE)
    return Filmed(path, len(layout.kept), layout.skipped)


class _Layout(NamedTuple):
    """Frames, size and value range of a film, known before drawing."""

    kept: list[int]
    skipped: dict[str, str]
    height: int
    width: int
    low: float
    high: float


class _Drawn(NamedTuple):
    """Frame and its map in color. Both [H, W, 3]."""

    name: str
    photo: Pixels
    map: Pixels


def _compute_maps(
    encoder: Encoder,
    frames: Frames,
    store: IO[bytes],
    form: Form,
    *,
    head: int | None,
    size: int | None,
    report: Callable[[int], None],
) -> _Layout:
    """Compute the map of each frame once, and save it to the store."""
    numbers = set(shown(frames.count)) if form == "strip" else range(sys.maxsize)  # a header may understate a video
    shape, kept, skipped = (0, 0), list[int](), dict[str, str]()
    lows, highs = list[float](), list[float]()
    for number, name, data in frames.read(numbers, encoder.images):
        report(number + 1)
        pixels = data if isinstance(data, BadImage) else decode(data, encoder.images)
        if isinstance(pixels, BadImage):
            skipped[name] = pixels.reason
            continue
        shape = shape if kept else (pixels.shape[0], pixels.shape[1])
        if pixels.shape[:2] != shape:
            skipped[name] = (
                f"other size: {pixels.shape[1]}x{pixels.shape[0]}; the first frame has {shape[1]}x{shape[0]}"
            )
            continue
        try:
            values = _select_head(attention_maps(encoder, pixels, size or default_size(encoder)).heads, head)
        except NotFinite as error:
            skipped[name] = error.reason
            continue
        np.save(store, values)
        kept.append(number)
        lows.append(float(values.min()))
        highs.append(float(values.max()))
    if not kept:
        if not skipped:
            raise DinoError(f"{frames.where} has no frames", "check that file")
        name, reason = next(iter(skipped.items()))
        raise DinoError(f"none of the frames of {frames.where} can be read; {name}: {reason}", "check that file")
    return _Layout(kept, skipped, *shape, min(lows), float(np.median(highs)))


def _select_head(heads: Map, head: int | None) -> Map:
    if head is None:
        return heads.mean(0)
    if head > len(heads):
        raise DinoError(
            f"--head {head} is larger than the {len(heads)} heads of this network", f"use --head {len(heads)} or fewer"
        )
    return heads[head - 1]


def _draw_frames(
    encoder: Encoder, frames: Frames, store: IO[bytes], layout: _Layout, max_width: int
) -> Iterator[_Drawn]:
    """Read the frames again, and yield each with its map on the film's color scale."""
    width = min(max_width, layout.width) // 2 * 2  # video sides must be even
    height = max(2, round(layout.height * width / layout.width / 2) * 2)
    for _, name, data in frames.read(set(layout.kept), encoder.images):
        pixels = data if isinstance(data, BadImage) else decode(data, encoder.images)
        if isinstance(pixels, BadImage):
            raise DinoError(
                f"{name} of {frames.where} was read once and can no longer be read: {pixels.reason}",
                "run the command again",
            )
        photo = Image.fromarray(visible(pixels)).resize((width, height), Image.Resampling.LANCZOS)
        yield _Drawn(name, np.asarray(photo), heat(np.load(store), height, width, (layout.low, layout.high)))


def _write_strip(drawn: Iterator[_Drawn], path: Path, rate: Fraction) -> None:
    frames = list(drawn)
    above = [Tile(frame.photo, Path(frame.name).stem) for frame in frames]
    with atomic(path) as draft:
        sheet([above, [Tile(frame.map, "") for frame in frames]]).save(draft, format="PNG")


def _write_gif(drawn: Iterator[_Drawn], path: Path, rate: Fraction) -> None:
    write_gif(_join_sides(drawn), path, rate, _reduce_colors)


def _write_mp4(drawn: Iterator[_Drawn], path: Path, rate: Fraction) -> None:
    write_mp4(_join_sides(drawn), path, rate)


def _join_sides(drawn: Iterator[_Drawn]) -> Iterator[Pixels]:
    return (np.concatenate([frame.photo, frame.map], axis=1) for frame in drawn)


def _reduce_colors(frame: Pixels) -> Image.Image:
    """Reduce a frame and its map to 256 colors; the map's colors are the same in all frames of a film."""
    levels = heat(np.linspace(0, 1, _MAP_COLORS, dtype=np.float32)[None], 1, _MAP_COLORS)[0]
    photo = Image.fromarray(frame[:, : frame.shape[1] // 2])
    own = np.array(photo.quantize(256 - _MAP_COLORS).getpalette() or [], dtype=np.uint8).reshape(-1, 3)
    palette = Image.new("P", (1, 1))
    palette.putpalette(np.concatenate([levels, own]).tobytes())
    return Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE)


_WRITERS: dict[Form, Callable[[Iterator[_Drawn], Path, Fraction], None]] = {
    "strip": _write_strip,
    "gif": _write_gif,
    "mp4": _write_mp4,
}
