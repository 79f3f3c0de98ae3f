"""Tracking on disk: read a video and a first mask; write masks, a film and a strip, and compute scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dinocli.apps.track.davis import VideoScore, frame_scores, video_score
from dinocli.apps.track.propagate import Looking, Rule, one_hot, track
from dinocli.core.errors import DinoError
from dinocli.data.decode.image import decode
from dinocli.data.decode.pixels import BadImage, Pixels
from dinocli.data.images import ImagesConfig
from dinocli.data.sources.frames import Frame, Frames, open_frames
from dinocli.data.sources.label_maps import LabelMap, Labels, read_labels, write_labels
from dinocli.features.encoder import Encoder
from dinocli.viz.film import shown, small, write_gif, write_strip
from dinocli.viz.picture import Tile, inner_edge, tinted, visible

_WIDTH = 480  # pixels, of a frame in the film
_STRIP_WIDTH = 320
_RATE = 12  # default frames per second
_ALL = range(1, 2**62)  # all frames after the first, even if the video holds more than its header says
# Colors of objects whose mask has no palette, distinct on photos and for people with red-green color blindness.
_COLORS = np.array(
    [(230, 60, 60), (50, 140, 240), (250, 200, 40), (40, 180, 130), (200, 100, 220), (250, 140, 40)], np.uint8
)


@dataclass(frozen=True)
class Tracked:
    """Files and scores of a tracked video.

    Attributes:
        masks: Folder with a mask per frame, by the frame's name.
        gif: Path of the film with masks overlaid.
        strip: Path of a picture with some frames side by side.
        frames: Number of frames, including the first.
        skipped: Frames that were skipped or not scored, with reasons.
        score: Score of the masks, or None without true masks.
        still: Score of the first mask copied to every frame: the baseline of tracking.
    """

    masks: Path
    gif: Path
    strip: Path
    frames: int
    skipped: dict[str, str]
    score: VideoScore | None = None
    still: VideoScore | None = None


def first_mask(path: Path, frames: Frames, images: ImagesConfig) -> tuple[LabelMap, Pixels]:
    """Return the mask of the first frame, with void pixels set to 0, and that frame.

    Raises:
        DinoError: If mask or frame cannot be read, their sizes differ, or the mask holds no object.
    """
    frame = next(frames.read({0}, images), None)
    pixels = _decode(frame, images) if frame else BadImage("there are no frames")
    if isinstance(pixels, BadImage):
        raise DinoError(f"the first frame of {frames.where} cannot be read: {pixels.reason}", "remove that frame")
    labels = read_labels(path)
    if isinstance(labels, BadImage):
        raise DinoError(
            f"{path}: {labels.reason}; expected a mask of the first frame",
            "save the mask as PNG: numbers from 1 to 255 for objects, 0 elsewhere",
        )
    if labels.values.shape != pixels.shape[:2]:
        (height, width), size = labels.values.shape, pixels.shape
        raise DinoError(
            f"{path} has {width}x{height} pixels; the first frame has {size[1]}x{size[0]}",
            "use a mask drawn on that frame",
        )
    if not labels.objects:
        void = " or 255 (void in a palette)" if labels.void.any() else ""
        raise DinoError(
            f"{path} is 0 everywhere{void}; expected a mask with an object",
            "mark the object with a value from 1 to 254",
        )
    return labels.cleared, pixels


def too_small(encoder: Encoder, labels: LabelMap, pixels: Pixels, looking: Looking) -> list[int]:
    """Return objects that cover the center of no patch and thus cannot be tracked."""
    height, width = encoder.photo(pixels, looking.short_side).shape[-2:]
    patch = encoder.backbone.patch_size
    hot = one_hot(labels.values, labels.objects, (height // patch, width // patch))
    return [number for number, there in zip(labels.objects, hot.flatten(1).any(1).tolist(), strict=True) if not there]


def track_video(
    encoder: Encoder,
    video: Frames,
    first: tuple[LabelMap, Pixels],
    out: Path,
    *,
    rule: Rule,
    looking: Looking,
    truth: Path | None = None,
    per_second: float | None = None,
    advance: Callable[[int], None] = lambda done: None,
) -> Tracked:
    """Track the objects of a first mask through a video, and write masks, film and strip.

    Frames are read, written and released one by one.

    Args:
        encoder: Frozen network whose patches are compared between frames.
        video: Frames of the video.
        first: Mask of the first frame, and the frame.
        out: Folder for `masks/`, `track.gif` and `strip.png`.
        rule: Rule of label propagation.
        looking: Settings of the patch features.
        truth: Folder of true masks by frame name; the first and the last frame are not scored.
        per_second: Frames per second of the film. If None, the video's rate, or 12.
        advance: Progress callback with the number of frames done.

    Raises:
        DinoError: If no true mask can be scored.
    """
    labels, pixels = first
    reader = _Reader(video, encoder.images, pixels.shape)
    scorer = _Scorer(truth, labels) if truth else None

    def frames() -> Iterator[tuple[Frame, Pixels, Labels]]:
        yield next(video.read({0}, encoder.images)), pixels, labels.values
        # The tracker yields the labels of a frame before it takes the next.
        for labels_found in track(encoder, pixels, labels.values, reader, rule, looking):
            yield reader.now, reader.pixels, labels_found

    strip: list[Tile] = []
    chosen = set(shown(video.count))

    def film() -> Iterator[Pixels]:
        for frame, frame_pixels, labels_found in frames():
            name = _format_stem(frame)
            write_labels(out / "masks" / f"{name}.png", LabelMap(labels_found, labels.palette))
            if scorer and 0 < frame.number < video.count - 1:
                scorer.add(frame, labels_found)
            drawn = overlay(visible(frame_pixels), LabelMap(labels_found, labels.palette))
            if frame.number in chosen:
                strip.append(Tile(small(drawn, _STRIP_WIDTH), name))
            advance(frame.number + 1)
            yield small(drawn, _WIDTH)

    gif, picture = out / "track.gif", out / "strip.png"
    count = write_gif(film(), gif, per_second or float(video.rate or _RATE))
    write_strip(strip, picture)
    score, still = scorer.scores() if scorer else (None, None)
    skipped = reader.skipped | (scorer.skipped if scorer else {})
    return Tracked(out / "masks", gif, picture, count, skipped, score, still)


def _format_stem(frame: Frame) -> str:
    """Return the stem of a frame's file; for a video, the frame number from 0 as in DAVIS."""
    return Path(frame.name).stem if isinstance(frame.data, bytes) else f"{frame.number:05}"


def _decode(frame: Frame, images: ImagesConfig) -> Pixels | BadImage:
    return frame.data if isinstance(frame.data, BadImage) else decode(frame.data, images)


@dataclass
class _Reader:
    """Readable frames after the first, all of its size; `now` and `pixels` hold the last one."""

    video: Frames
    images: ImagesConfig
    shape: tuple[int, ...]
    skipped: dict[str, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Pixels]:
        for frame in self.video.read(_ALL, self.images):
            pixels = _decode(frame, self.images)
            if isinstance(pixels, BadImage):
                self.skipped[frame.name] = pixels.reason
            elif pixels.shape != self.shape:
                sizes = [f"{shape[1]}x{shape[0]}" for shape in (pixels.shape, self.shape)]
                self.skipped[frame.name] = f"another size: {sizes[0]} pixels; the first frame has {sizes[1]}"
            else:
                self.now, self.pixels = frame, pixels
                yield pixels


class _Scorer:
    """Scores of masks against the true ones, frame by frame."""

    def __init__(self, folder: Path, first: LabelMap) -> None:
        self.skipped: dict[str, str] = {}
        self._truth = {path.stem: path for path in open_frames(folder).files}
        self._first = first
        self._found: list[NDArray[np.float64]] = []
        self._still: list[NDArray[np.float64]] = []

    def add(self, frame: Frame, found: Labels) -> None:
        path = self._truth.get(_format_stem(frame))
        if path is None:
            return
        truth = read_labels(path)
        if isinstance(truth, BadImage) or truth.values.shape != found.shape:
            why = truth.reason if isinstance(truth, BadImage) else "another size than its frame's"
            self.skipped[frame.name] = f"not scored; true mask {path}: {why}"
            return
        self._found.append(frame_scores(found, truth, self._first.objects))
        self._still.append(frame_scores(self._first.values, truth, self._first.objects))

    def scores(self) -> tuple[VideoScore, VideoScore]:
        if not self._found:
            bad = next(iter(self.skipped.items()), None)
            raise DinoError(
                f"none of the true masks can be scored; {bad[0]}: {bad[1]}"
                if bad
                else "no true mask is named like a frame between the first and the last",
                "use --truth FOLDER with masks named like the frames",
            )
        return video_score(self._found, self._first.objects), video_score(self._still, self._first.objects)


def overlay(pixels: Pixels, labels: LabelMap) -> Pixels:
    """Draw a frame with each object tinted and outlined in its color. [H, W, 3]"""
    colors = np.zeros((256, 3), np.uint8)
    for i, number in enumerate(labels.objects):
        colors[number] = _pick_color(labels, number, i)
    drawn = np.where(labels.values[..., None] > 0, tinted(pixels, labels.values, colors, 0.45), pixels)
    for number in labels.objects:
        drawn[inner_edge(labels.values == number)] = colors[number]
    return drawn


def _pick_color(labels: LabelMap, number: int, place: int) -> Pixels:
    own = np.frombuffer(labels.palette or b"", np.uint8).reshape(-1, 3)
    if number < len(own) and np.ptp(own[number]):  # greys are hard to see in a photo
        return own[number]
    return _COLORS[place % len(_COLORS)]
