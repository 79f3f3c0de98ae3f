"""`dino attn-map`: attention maps of the class token, and similarities of patches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from dinocli.cli import console
from dinocli.cli.layout import METHOD, OUTPUT
from dinocli.cli.options import (
    Checkpoints,
    Device,
    Json,
    Mass,
    NetworkName,
    Settings,
    ShortSide,
    encoders_from,
    output_place,
)
from dinocli.cli.places import photo_places
from dinocli.cli.points import Point, Points, check_points, parse_points
from dinocli.cli.words import Misuse
from dinocli.core.errors import DinoError

if TYPE_CHECKING:
    from dinocli.apps.attention.films import Form
    from dinocli.apps.attention.sheets import Drawn
    from dinocli.data.decode.pixels import Pixels
    from dinocli.data.sources.frames import Frames
    from dinocli.evals.attention import Overlap
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
    checkpoint: Checkpoints = None,
    network: NetworkName = "teacher",
    mass: Mass = 0.6,
    masks: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Compare the attention with the objects' masks in this folder, named like the photos: Jaccard of the "
            "best head.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    short_side: ShortSide = None,
    stride: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Distance of neighbouring patches in pixels: below the patch size they overlap, and maps are finer. "
            "Default: the patch size.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    tile: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Cut larger photos into overlapping tiles of N pixels, in bounded memory. The default of --short-side "
            "is then the photo's own, if larger.",
            rich_help_panel=METHOD,
        ),
    ] = None,
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
    point: Points = None,
    json: Json = False,
) -> None:
    """Draw the last block's attention per head, in color and as masks, beside the photo; with --film, over a video.

    Several --checkpoint are drawn below each other.

    Examples:
        dino attn-map img.jpg
        dino attn-map img.jpg --point 120,80
        dino attn-map ./photos --masks ./masks --checkpoint runs/tiny-1
        dino attn-map ./frames --film gif --head 1 --checkpoint runs/tiny-1
    """
    points, several = parse_points(point), len(checkpoint or []) > 1
    if film and (raw or points or masks or stride or tile or several):
        others = {"--raw": raw, "--point": points, "--masks": masks, "--stride": stride, "--tile": tile}
        other = next((name for name, given in others.items() if given), "a second --checkpoint")
        raise Misuse(f"{other} is for photos only; it cannot be combined with --film", f"omit {other} or --film")
    if not film and (head or fps):
        raise Misuse("--head and --fps need --film", "add --film gif, strip or mp4")
    if points and (raw or masks):
        other = "--masks" if masks else "--raw"
        raise Misuse(f"{other} is for attention maps; it cannot be combined with --point", f"omit {other} or --point")
    if raw and several:
        raise Misuse("--raw writes the maps of one network", "name one --checkpoint, or omit --raw")
    out = output_place(out)
    films, files = (_find_films(images), {}) if film else ({}, _find_photos(images))

    from dinocli.apps.attention.films import ENDINGS
    from dinocli.data.sources.outputs import marked
    from dinocli.data.sources.photos import spare

    if film:
        made = [out / f"{name}{ENDINGS[film]}" for name in films]
        spare(made, (path for frames in films.values() for path in (frames.where, *frames.files)))
    else:
        made = [out / f"{name}{'-similarity' * bool(points)}.png" for name in files.values()]
        spare(made, files)
    pairs, unmatched = _find_masks(files, masks) if masks else ({}, {})

    encoders = encoders_from(checkpoint, device, network, overrides)
    _fit_patches(encoders, stride, tile)
    with marked(out, "attn-map", made):
        if film:
            _draw_films(encoders[0], films, out, film, head, short_side, fps, json)
        elif points:
            _draw_points(encoders, files, out, points, short_side, tile, json)
        else:
            _draw_photos(encoders, files, out, mass, short_side, tile, raw, pairs, unmatched, json)


def _fit_patches(encoders: Sequence[Encoder], stride: int | None, tile: int | None) -> None:
    """Set the stride of the patches, check the tiles, and print the memory that they take."""
    if not stride and not tile:
        return
    from dinocli.evals.photo_maps import activation_bytes, check_tile

    for encoder in encoders:
        if stride:
            encoder.backbone.use_stride(stride)
        if tile:
            check_tile(encoder.backbone, tile)
        patches, memory = activation_bytes(encoder.backbone, tile)
        console.say(f"{encoder.source}: at most {patches:,} patches at once, in about {memory / 1e6:,.0f} MB")


T = TypeVar("T")


def _draw_each(files: dict[Path, Path], draw: Callable[[Path, Path], T | str], skipped: dict[str, str]) -> list[T]:
    """Draw each photo; print the reasons for skipped ones, which include those given."""
    drawn = []
    with console.progress("attn-map", len(files), "images") as advance:
        for done, (path, name) in enumerate(files.items(), 1):
            result = draw(path, name)
            if isinstance(result, str):
                skipped[str(path)] = result
            else:
                drawn.append(result)
            advance(done)
    console.skipped(skipped)
    return drawn


def _draw_photos(
    encoders: Sequence[Encoder],
    files: dict[Path, Path],
    out: Path,
    mass: float,
    short_side: int | None,
    tile: int | None,
    raw: bool,
    masks: dict[Path, Path],
    unmatched: dict[str, str],
    json: bool,
) -> None:
    from dinocli.apps.attention.sheets import draw

    def draw_one(path: Path, name: Path) -> Drawn | str:
        return draw(encoders, path, out / name, keep=mass, size=short_side, raw=raw, tile=tile, mask=masks.get(path))

    drawn = _draw_each({path: name for path, name in files.items() if str(path) not in unmatched}, draw_one, unmatched)
    if not drawn:
        raise DinoError("none of the images can be read", "name a photo such as a .jpg")
    _note_reduced((d.image, block.maps.reduced_to) for d in drawn for block in d.blocks)
    means = [
        sum(block.overlap.jaccard for block in blocks if block.overlap) / len(blocks)
        for blocks in zip(*(d.blocks for d in drawn), strict=True)
    ]
    if json:
        rows = [_list_drawn(d) for d in drawn]
        average = [
            {"checkpoint": encoder.source, "jaccard": mean} for encoder, mean in zip(encoders, means, strict=True)
        ]
        console.out_json({"mean": average, "images": rows, "skipped": unmatched} if masks else rows)
    elif masks:
        cells = [[str(d.image), *(_format_overlap(block.overlap) for block in d.blocks)] for d in drawn]
        title = f"Jaccard of {mass:.0%} of the best head's attention and the objects of {len(drawn)} photos"
        average_row = ["mean", *(f"{mean:.3f}" for mean in means)]
        console.table(["image", *(e.source for e in encoders)], [*cells, average_row], title=title)
    for d in () if json else drawn:
        console.out(str(d.picture))
    console.saved((path for d in drawn for path in (d.picture, d.raw) if path), "dino segment IMAGES")


def _list_drawn(drawn: Drawn) -> dict[str, Any]:
    """Return the files and maps of a photo for JSON."""
    networks = [
        {"checkpoint": block.source, "rows": block.maps.heads.shape[1], "columns": block.maps.heads.shape[2]}
        | ({"jaccard": block.overlap.jaccard, "heads": list(block.overlap.heads)} if block.overlap else {})
        for block in drawn.blocks
    ]
    raw = drawn.raw and str(drawn.raw)
    return {"image": str(drawn.image), "picture": str(drawn.picture), "raw": raw, "networks": networks}


def _format_overlap(overlap: Overlap | None) -> str:
    return f"{overlap.jaccard:.3f} (head {', '.join(map(str, overlap.heads))})" if overlap else ""


def _note_reduced(sides: Iterable[tuple[Path, int | None]]) -> None:
    """Print a note if a photo had too many patches and was reduced."""
    for path, side in sides:
        if side:
            console.say(
                f"note: {path} was reduced to a short side of {side} pixels: too many patches; --tile N avoids it"
            )
            return


def _draw_points(
    encoders: Sequence[Encoder],
    files: dict[Path, Path],
    out: Path,
    points: Sequence[Point],
    short_side: int | None,
    tile: int | None,
    json: bool,
) -> None:
    from dinocli.apps.match.similar import draw_own_similarities, patch_map
    from dinocli.data.decode.pixels import BadImage
    from dinocli.data.sources.photos import read_photo
    from dinocli.evals.attention import default_size
    from dinocli.features.encoder import NotFinite

    sides = list[tuple[Path, int | None]]()

    def draw_one(path: Path, name: Path) -> dict[str, Any] | str:
        photo: Pixels | None = None
        maps = []
        for encoder in encoders:
            pixels = read_photo(path, encoder.images)
            if isinstance(pixels, BadImage):
                return pixels.reason
            photo = pixels if photo is None else photo
            try:
                check_points(points, path, pixels)
                side = short_side or default_size(encoder, pixels if tile else None)
                own, reduced_to = patch_map(encoder, pixels, side, tile)
                maps.append((encoder.source, own))
                sides.append((path, reduced_to))
            except NotFinite as error:
                return error.reason
            except DinoError as error:
                if len(files) == 1:
                    raise
                return error.message
        assert photo is not None
        picture = out / f"{name}-similarity.png"
        scales = draw_own_similarities(picture, photo, maps, points)
        networks = [
            {
                "checkpoint": source,
                "rows": own.grid[0],
                "columns": own.grid[1],
                "points": [
                    {"x": x, "y": y, "low": round(low, 4), "high": round(high, 4)}
                    for (x, y), (low, high) in zip(points, ranges, strict=True)
                ],
            }
            for (source, own), ranges in zip(maps, scales, strict=True)
        ]
        return {"image": str(path), "picture": str(picture), "networks": networks}

    drawn = _draw_each(files, draw_one, {})
    _note_reduced(sides)
    if not drawn:
        raise DinoError("none of the images can be drawn", "name a photo such as a .jpg, and a point inside it")
    if json:
        console.out_json(drawn)
    else:
        for one in drawn:
            console.out(one["picture"])
    console.saved((one["picture"] for one in drawn), "dino match PHOTO OTHER_PHOTO --point X,Y")


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
    console.saved((m.path for m in made), "dino track FRAMES --mask MASK")


def _find_masks(files: dict[Path, Path], folder: Path) -> tuple[dict[Path, Path], dict[str, str]]:
    """Return the mask of each photo that has one, and the reason for each photo without.

    Raises:
        DinoError: If the folder does not exist or is empty, or no photo has a mask.
    """
    from dinocli.data.sources.masks import MaskFolder, with_masks

    pairs, unmatched = with_masks(files, MaskFolder(folder))
    if not pairs:
        raise DinoError(
            f"none of {len(files)} photos has a mask of its name in {folder}", "name each mask like its photo"
        )
    return pairs, {str(path): reason for path, reason in unmatched.items()}


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
    notes: list[str] = []
    files = named_photos(images, notes)
    console.notes(notes)
    return files
