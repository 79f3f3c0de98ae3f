"""`dino track`: tracking of objects through a video, from a mask of the first frame."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dinocli.cli import console
from dinocli.cli.layout import METHOD, OUTPUT
from dinocli.cli.options import (
    Checkpoint,
    Device,
    FacetName,
    Json,
    Layer,
    NetworkName,
    NetworkOptions,
    Settings,
    Temperature,
    output_place,
)
from dinocli.cli.places import photo_place
from dinocli.core.errors import DinoError

if TYPE_CHECKING:
    from dinocli.apps.track.davis import Score, VideoScore

# Shared with `dino eval track`.
FramesPlace = Annotated[
    Path,
    typer.Argument(
        metavar="FRAMES", callback=photo_place, help="Folder of video frames, ordered by name, or a video file."
    ),
]
FirstMask = Annotated[
    Path,
    typer.Option(
        "--mask",
        help="Mask of the first frame, as PNG: 0 is background, each other value is an object.",
        rich_help_panel=METHOD,
    ),
]
FrameSide = Annotated[
    int, typer.Option("--short-side", min=8, help="Short side in pixels of the resized frames.", rich_help_panel=METHOD)
]
Previous = Annotated[
    int,
    typer.Option(
        "--previous",
        min=0,
        help="Number of previous frames to propagate labels from, besides the first frame.",
        rich_help_panel=METHOD,
    ),
]
Radius = Annotated[
    int,
    typer.Option("--radius", min=0, help="Largest distance of label propagation, in patches.", rich_help_panel=METHOD),
]
Neighbours = Annotated[
    int,
    typer.Option(
        "--k", min=1, help="Number of nearest neighbours that vote on each patch's label.", rich_help_panel=METHOD
    ),
]
Tracks = Annotated[Path, typer.Option("--out", help="Folder for the masks and the GIF.", rich_help_panel=OUTPUT)]
Fps = Annotated[
    float | None,
    typer.Option(
        "--fps",
        min=0.1,
        max=50,
        help="Frames per second of the GIF. Default: those of the video, else 12.",
        rich_help_panel=OUTPUT,
    ),
]


@dataclass(frozen=True)
class PropagationOptions:
    """Values of the options that select the patch features and set the rule of label propagation."""

    short_side: int
    layer: int
    facet: Literal["token", "query", "key", "value"]
    previous: int
    radius: int
    k: int
    temperature: float


def track(
    frames: FramesPlace,
    mask: FirstMask,
    checkpoint: Checkpoint = None,
    network: NetworkName = "teacher",
    short_side: FrameSide = 480,
    previous: Previous = 7,
    radius: Radius = 12,
    k: Neighbours = 5,
    temperature: Temperature = 0.1,
    layer: Layer = -1,
    facet: FacetName = "token",
    overrides: Settings = None,
    device: Device = "auto",
    out: Tracks = Path("track"),
    fps: Fps = None,
    json: Json = False,
) -> None:
    """Track objects through a video from a mask of its first frame; write a mask per frame, and an overlay GIF.

    Examples:
        dino track ./frames --mask first.png
        dino track film.mp4 --mask first.png --short-side 240 --out tracked
    """
    options = NetworkOptions(checkpoint, network, overrides, device)
    propagation = PropagationOptions(short_side, layer, facet, previous, radius, k, temperature)
    track_frames(frames, mask, options, propagation, out, fps, json=json)


def track_frames(
    frames: Path,
    mask: Path,
    options: NetworkOptions,
    propagation: PropagationOptions,
    out: Path,
    fps: float | None,
    *,
    truth: Path | None = None,
    json: bool,
) -> None:
    """Track objects through a video, and score the masks if true ones are given."""
    if not mask.exists():
        raise DinoError(f"{mask} does not exist; expected a mask of the first frame", "check the path")
    out = output_place(out)
    if any(given and given.resolve() == (out / "masks").resolve() for given in (frames, mask.parent, truth)):
        raise DinoError(f"{out / 'masks'} holds an input that would be overwritten", "name another folder with --out")
    from dinocli.apps.track.propagate import Looking, Rule
    from dinocli.apps.track.videos import first_mask, too_small, track_video
    from dinocli.data.sources.frames import open_frames
    from dinocli.data.sources.outputs import marked
    from dinocli.data.sources.photos import spare

    video = open_frames(frames)
    spare([out / "track.gif", out / "strip.png"], [frames, mask, *video.files])
    encoder = options.encoder()
    looking = Looking(propagation.short_side, propagation.layer, propagation.facet)
    rule = Rule(propagation.previous, propagation.radius, propagation.k, propagation.temperature)
    first = first_mask(mask, video, encoder.images)
    for lost in too_small(encoder, *first, looking):
        console.say(f"note: object {lost} is smaller than a patch and cannot be tracked; use a larger --short-side")
    stems = [path.stem for path in video.files] or [f"{number:05}" for number in range(video.count)]
    made = [out / "track.gif", out / "strip.png", *(out / "masks" / f"{stem}.png" for stem in stems)]
    with marked(out, "track", made), console.progress("track", video.count, "frames") as advance:
        done = track_video(
            encoder, video, first, out, rule=rule, looking=looking, truth=truth, per_second=fps, advance=advance
        )
    console.skipped(done.skipped)
    if json:
        paths = {"masks": str(done.masks), "gif": str(done.gif), "strip": str(done.strip)}
        scores = {"score": _to_dict(done.score), "copying the first mask": _to_dict(done.still)} if done.score else {}
        console.out_json(paths | {"frames": done.frames, "skipped": done.skipped} | scores)
    elif done.score and done.still:
        rows = [_format_row("all", done.score.mean, done.still.mean)] if len(done.score.objects) > 1 else []
        rows += [_format_row(str(n), score, done.still.objects[n]) for n, score in done.score.objects.items()]
        title = f"{done.score.frames} frames of {encoder.source}, without the first and the last, in percent"
        console.table(["object", "J", "F", "J&F", "J copied", "F copied"], rows, title=title)
    for path in () if json else (done.strip, done.gif, done.masks):
        console.out(str(path))
    following = "dino track FRAMES --mask MASK" if truth else "dino eval track FRAMES --mask MASK --truth MASKS"
    console.saved([done.strip, done.gif, done.masks], following)


def _format_row(name: str, score: Score, still: Score) -> list[str]:
    return [name, *(f"{100 * x:.1f}" for x in (score.j, score.f, score.j_and_f, still.j, still.f))]


def _to_dict(score: VideoScore | None) -> dict[str, Any] | None:
    return asdict(score) if score else None
