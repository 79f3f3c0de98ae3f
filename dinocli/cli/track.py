"""`dino track`: objects of a first mask, tracked through a video."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dinocli.cli import console
from dinocli.cli.options import Checkpoint, Device, FacetName, Json, NetworkName, Settings, encoder_from, output_place
from dinocli.cli.places import photo_place
from dinocli.core.errors import DinoError

if TYPE_CHECKING:
    from dinocli.apps.track.davis import Score, VideoScore


def track(
    frames: Annotated[
        Path, typer.Argument(callback=photo_place, help="Folder of video frames, ordered by name, or a video file.")
    ],
    mask: Annotated[
        Path, typer.Option(help="Mask of the first frame, as PNG: 0 for background, any other value for an object.")
    ],
    checkpoint: Checkpoint = None,
    out: Annotated[Path, typer.Option(help="Folder for the masks and the GIF.")] = Path("track"),
    evaluate: Annotated[
        Path | None, typer.Option(metavar="MASKS", help="Folder of true masks, named like the frames; prints J and F.")
    ] = None,
    size: Annotated[int, typer.Option(min=8, help="Short side in pixels of the resized frames.")] = 480,
    previous: Annotated[int, typer.Option(min=0, help="Previous frames that propagate labels, besides the first.")] = 7,
    radius: Annotated[int, typer.Option(min=0, help="Radius of label propagation, in patches.")] = 12,
    top: Annotated[int, typer.Option(min=1, help="Most similar patches that vote on a patch's label.")] = 5,
    temperature: Annotated[
        float, typer.Option(min=1e-4, help="Temperature of the vote weights exp(cosine / temperature).")
    ] = 0.1,
    layer: Annotated[int, typer.Option(help="Block whose patches are compared: 1 is the first, -1 the last.")] = -1,
    facet: FacetName = "token",
    fps: Annotated[
        float | None, typer.Option(min=0.1, max=50, help="Frames per second of the GIF. Default: the video's, else 12.")
    ] = None,
    network: NetworkName = "teacher",
    overrides: Settings = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Track the objects of a first mask through a video; write a mask per frame, and a GIF with the masks overlaid."""
    if not mask.exists():
        raise DinoError(f"{mask} does not exist; expected a mask of the first frame", "check the path")
    out = output_place(out)
    if any(given and given.resolve() == (out / "masks").resolve() for given in (frames, mask.parent, evaluate)):
        raise DinoError(f"{out / 'masks'} holds an input that would be overwritten", "name another folder with --out")
    from dinocli.apps.track.propagate import Looking, Rule
    from dinocli.apps.track.videos import first_mask, too_small, track_video
    from dinocli.data.sources.frames import open_frames
    from dinocli.data.sources.outputs import marked
    from dinocli.data.sources.photos import spare

    video = open_frames(frames)
    spare([out / "track.gif", out / "strip.png"], [frames, mask, *video.files])
    encoder = encoder_from(checkpoint, device, network, overrides)
    looking = Looking(size, layer, facet)
    first = first_mask(mask, video, encoder.images)
    for lost in too_small(encoder, *first, looking):
        console.say(f"note: object {lost} is smaller than a patch and cannot be tracked; use a larger --size")
    stems = [path.stem for path in video.files] or [f"{number:05}" for number in range(video.count)]
    made = [out / "track.gif", out / "strip.png", *(out / "masks" / f"{stem}.png" for stem in stems)]
    with marked(out, "track", made), console.progress("track", video.count, "frames") as advance:
        done = track_video(
            encoder,
            video,
            first,
            out,
            rule=Rule(previous, radius, top, temperature),
            looking=looking,
            truth=evaluate,
            per_second=fps,
            advance=advance,
        )
    console.skipped(done.skipped)
    if json:
        paths = {"masks": str(done.masks), "gif": str(done.gif), "strip": str(done.strip)}
        scores = {"score": _plain(done.score), "copying the first mask": _plain(done.still)} if done.score else {}
        console.out_json(paths | {"frames": done.frames, "skipped": done.skipped} | scores)
        return
    if done.score and done.still:
        rows = [_row("all", done.score.mean, done.still.mean)] if len(done.score.objects) > 1 else []
        rows += [_row(str(n), score, done.still.objects[n]) for n, score in done.score.objects.items()]
        title = f"{done.score.frames} frames of {encoder.source}, without the first and the last, in percent"
        console.table(["object", "J", "F", "J&F", "J copied", "F copied"], rows, title=title)
    for path in (done.strip, done.gif, done.masks):
        console.out(str(path))


def _row(name: str, score: Score, still: Score) -> list[str]:
    return [name, *(f"{100 * x:.1f}" for x in (score.j, score.f, score.j_and_f, still.j, still.f))]


def _plain(score: VideoScore | None) -> dict[str, Any] | None:
    return asdict(score) if score else None
