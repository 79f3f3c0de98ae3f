"""`dino attn-map`: attention maps of the class token."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dinocli.cli import console
from dinocli.cli.layout import METHOD, OUTPUT
from dinocli.cli.options import (
    Checkpoint,
    Device,
    Json,
    Mass,
    NetworkName,
    Settings,
    ShortSide,
    encoder_from,
    output_place,
)
from dinocli.cli.places import photo_places
from dinocli.cli.words import Misuse
from dinocli.core.errors import DinoError

if TYPE_CHECKING:
    from dinocli.apps.attention.films import Form
    from dinocli.data.sources.frames import Frames
    from dinocli.features.encoder import Encoder


def attn_map(
    images: Annotated[
        list[Path],
        typer.Argument(
            metavar="IMAGES...",
            callback=photo_places,
            help="Photos, folders, and lists of photos; with --film: folders of frames, and videos.",
        ),
    ],
    checkpoint: Checkpoint = None,
    network: NetworkName = "teacher",
    mass: Mass = 0.6,
    short_side: ShortSide = None,
    head: Annotated[
        int | None,
        typer.Option(min=1, help="With --film: attention head. Default: the mean of all.", rich_help_panel=METHOD),
    ] = None,
    overrides: Settings = None,
    device: Device = "auto",
    out: Annotated[Path, typer.Option(help="Folder for the pictures.", rich_help_panel=OUTPUT)] = Path("attention"),
    raw: Annotated[
        bool, typer.Option("--raw", help="Also write the attention maps as safetensors.", rich_help_panel=OUTPUT)
    ] = False,
    film: Annotated[
        Literal["strip", "gif", "mp4"] | None,
        typer.Option(
            help="Draw the frames of a folder or video as one picture: a strip of eight frames, or an animation of all "
            "frames beside their maps. All maps share one color scale.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    fps: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            max=240,
            help="With --film: frames per second. Default: those of the video, else 24.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Draw the last block's attention per head, in color and as masks, beside the photo; with --film, over a video.

    Examples:
        dino attn-map img.jpg
        dino attn-map ./frames --film gif --head 1 --checkpoint runs/tiny-1
    """
    if film and raw:
        raise Misuse("--raw writes maps of photos only; it cannot be combined with --film", "omit --raw or --film")
    if not film and (head or fps):
        raise Misuse("--head and --fps need --film", "add --film gif, strip or mp4")
    out = output_place(out)
    films, files = (_find_films(images), {}) if film else ({}, _find_photos(images))

    from dinocli.apps.attention.films import ENDINGS
    from dinocli.data.sources.outputs import marked
    from dinocli.data.sources.photos import spare

    if film:
        made = [out / f"{name}{ENDINGS[film]}" for name in films]
        spare(made, (path for frames in films.values() for path in (frames.where, *frames.files)))
    else:
        made = [out / f"{name}.png" for name in files.values()]
        spare(made, files)

    encoder = encoder_from(checkpoint, device, network, overrides)
    with marked(out, "attn-map", made):
        if film:
            _draw_films(encoder, films, out, film, head, short_side, fps, json)
        else:
            _draw_photos(encoder, files, out, mass, short_side, raw, json)


def _draw_photos(
    encoder: Encoder, files: dict[Path, Path], out: Path, mass: float, short_side: int | None, raw: bool, json: bool
) -> None:
    from dinocli.apps.attention.sheets import draw

    drawn, skipped = [], {}
    with console.progress("attn-map", len(files), "images") as advance:
        for done, (path, name) in enumerate(files.items(), 1):
            result = draw(encoder, path, out / name, keep=mass, size=short_side, raw=raw)
            if isinstance(result, str):
                skipped[str(path)] = result
            else:
                drawn.append(result)
            advance(done)
    console.skipped(skipped)
    if not drawn:
        raise DinoError("none of the images can be read", "name a photo such as a .jpg")
    if json:
        console.out_json(
            [{"image": str(d.image), "picture": str(d.picture), "raw": d.raw and str(d.raw)} for d in drawn]
        )
    else:
        for d in drawn:
            console.out(str(d.picture))


def _draw_films(
    encoder: Encoder,
    films: dict[str, Frames],
    out: Path,
    form: Form,
    head: int | None,
    short_side: int | None,
    fps: float | None,
    json: bool,
) -> None:
    from fractions import Fraction

    from dinocli.apps.attention.films import ENDINGS, film

    rate = Fraction(fps).limit_denominator(1000) if fps else None
    made = []
    for name, frames in films.items():
        path = out / f"{name}{ENDINGS[form]}"
        with console.progress(f"attn-map {name}", frames.count, "frames") as advance:
            made.append(film(encoder, frames, path, form, head=head, size=short_side, rate=rate, report=advance))
        for bad, reason in made[-1].skipped.items():
            console.say(f"note: skipped {bad} of {frames.where}: {reason}")
        if not json:
            console.out(str(path))
    if json:
        console.out_json([{"film": str(m.path), "frames": m.frames, "skipped": m.skipped} for m in made])


def _find_films(images: list[Path]) -> dict[str, Frames]:
    """Return films by name: one per folder or video, and one for all single images together."""
    from dinocli.data.sources.frames import Frames, is_video, open_frames

    whole = [path for path in images if path.is_dir() or is_video(path)]
    files = [path for path in images if path not in whole]
    missing = next((path for path in images if not path.exists()), None)
    if missing:
        raise DinoError(f"{missing} does not exist; expected a folder of frames or a video", "check the path")
    places = {path: open_frames(path) for path in whole}
    if files:
        places[files[0].parent] = Frames(files[0].parent, files)
    names = [path.resolve().stem for path in places]
    # Many folders of frames are named `frames`; add the parent folder's name then.
    return {
        name if names.count(name) == 1 else "-".join(path.resolve().with_suffix("").parts[-2:]): frames
        for name, (path, frames) in zip(names, places.items(), strict=True)
    }


def _find_photos(images: list[Path]) -> dict[Path, Path]:
    """Map each image file to the name of its picture below the output folder."""
    from dinocli.data.sources.frames import is_video
    from dinocli.data.sources.photos import named_photos

    if video := next((path for path in images if is_video(path)), None):
        raise DinoError(f"{video} is a video; expected photos", "add --film strip, gif or mp4")
    return named_photos(images)
