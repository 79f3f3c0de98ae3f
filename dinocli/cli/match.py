"""`dino match`: patch correspondences between two photos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dinocli.cli import console
from dinocli.cli.layout import METHOD, OUTPUT
from dinocli.cli.learned import print_saved
from dinocli.cli.options import (
    Checkpoint,
    Device,
    FacetName,
    Json,
    NetworkName,
    NetworkOptions,
    Settings,
    ShortSide,
    output_place,
)
from dinocli.cli.places import photo_place
from dinocli.cli.words import Misuse
from dinocli.core.errors import DinoError

if TYPE_CHECKING:
    from dinocli.apps.match.correspond import Matches, PatchMap, Pck
    from dinocli.data.decode.pixels import Pixels
    from dinocli.features.encoder import Encoder

# Shared with `dino eval match`.
PhotoA = Annotated[Path, typer.Argument(metavar="A", callback=photo_place, help="A photo.")]
PhotoB = Annotated[Path, typer.Argument(metavar="B", callback=photo_place, help="Another photo, of any size.")]
Layers = Annotated[
    list[int] | None,
    typer.Option(
        "--layer",
        help="Block whose patches are compared: 1 is the first, -1 the last; may be repeated. Default: -1.",
        rich_help_panel=METHOD,
    ),
]
Dimensions = Annotated[
    int | None,
    typer.Option(
        "--pca", min=1, help="Reduce patch features to N dimensions, by a PCA over both photos.", rich_help_panel=METHOD
    ),
]
Lines = Annotated[
    int, typer.Option("--lines", min=1, help="Approximate number of lines to draw.", rich_help_panel=OUTPUT)
]
Diffusion = Annotated[
    str | None,
    typer.Option(
        "--sd",
        metavar="MODEL",
        help="Concatenate features of a Stable Diffusion model: a folder, or a Hub name.",
        rich_help_panel=METHOD,
    ),
]
DiffusionWeight = Annotated[
    float,
    typer.Option(
        "--sd-weight",
        min=0,
        max=1,
        help="Weight of the Stable Diffusion features; the weight of the DINO features is 1 minus this.",
        rich_help_panel=METHOD,
    ),
]
DiffusionSide = Annotated[
    int,
    typer.Option(
        "--sd-long-side",
        min=64,
        help="Long side in pixels of the photos resized for Stable Diffusion.",
        rich_help_panel=METHOD,
    ),
]
Caption = Annotated[
    str | None,
    typer.Option("--caption", help="Caption of both photos for --sd. Default: none.", rich_help_panel=METHOD),
]
Pictures = Annotated[Path, typer.Option("--out", help="Folder for the picture.", rich_help_panel=OUTPUT)]


@dataclass(frozen=True)
class PatchOptions:
    """Values of the options that select the patch features to compare."""

    short_side: int | None
    layers: list[int] | None
    facet: Literal["token", "query", "key", "value"]
    pca: int | None


@dataclass(frozen=True)
class DiffusionOptions:
    """Values of --sd (`model`, None by default) and of the options that need it."""

    model: str | None
    weight: float
    long_side: int
    caption: str | None


def match(
    a: PhotoA,
    b: PhotoB,
    checkpoint: Checkpoint = None,
    network: NetworkName = "teacher",
    short_side: ShortSide = None,
    layer: Layers = None,
    facet: FacetName = "token",
    pca: Dimensions = None,
    sd: Diffusion = None,
    sd_weight: DiffusionWeight = 0.5,
    sd_long_side: DiffusionSide = 960,
    caption: Caption = None,
    overrides: Settings = None,
    device: Device = "auto",
    point: Annotated[
        list[str] | None,
        typer.Option(
            "--point",
            metavar="X,Y",
            help="Draw the similarity of the patch at this pixel of A to all patches of both photos; may be repeated.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    out: Pictures = Path("matches"),
    lines: Lines = 24,
    json: Json = False,
) -> None:
    """Match the patches of two photos by their features, and draw the matches.

    Examples:
        dino match a.jpg b.jpg
        dino match a.jpg b.jpg --point 120,80
        dino match a.jpg b.jpg --short-side 240 --layer 9 --facet key
    """
    options = NetworkOptions(checkpoint, network, overrides, device)
    patches = PatchOptions(short_side, layer, facet, pca)
    diffusion = DiffusionOptions(sd, sd_weight, sd_long_side, caption)
    match_photos(
        a, b, options, patches, diffusion, out, lines, places=[_parse(text) for text in point or []], json=json
    )


def match_photos(
    a: Path,
    b: Path,
    options: NetworkOptions,
    patches: PatchOptions,
    diffusion: DiffusionOptions,
    out: Path,
    lines: int,
    *,
    places: Sequence[tuple[float, float]] = (),
    keypoints: Path | None = None,
    pck_of: Literal["box", "image"] = "box",
    json: bool,
) -> None:
    """Match two photos, and draw the matches or the similarities of places of A; score them if keypoints are given."""
    _check_photos(a, b)
    out = output_place(out)
    picture = out / f"{a.stem}-{b.stem}{'-similarity' if places else ''}.png"
    from dinocli.apps.match.correspond import match as matched
    from dinocli.apps.match.correspond import near_enough, pck, spread_out
    from dinocli.apps.match.diffusion import load_diffusion
    from dinocli.apps.match.keypoints import read_keypoints
    from dinocli.apps.match.sheets import Compared, patch_maps, write_picture
    from dinocli.core.device import pick_device
    from dinocli.data.sources.outputs import marked
    from dinocli.data.sources.photos import spare

    spare([picture], [a, b])
    encoder = options.encoder()
    photos = _read(a, encoder), _read(b, encoder)
    known = keypoints and read_keypoints(keypoints, a, b, (photos[0].shape[:2], photos[1].shape[:2]))
    model, caption = None, diffusion.caption or ""
    if diffusion.model:
        model = load_diffusion(diffusion.model, pick_device(options.device), caption)
    if model and not caption:
        console.say("note: no --caption set for the diffusion model; add one, such as --caption 'a photo of a cat'")
    layers = tuple(patches.layers or [-1])
    compared = Compared(
        layers, patches.facet, patches.short_side, patches.pca, model, diffusion.weight, diffusion.long_side
    )
    _check_points(places, a, photos[0])
    maps = patch_maps(encoder, *photos, compared)
    if places:
        _draw_similarities(picture, photos, maps, places, json=json)
        return
    matches = matched(*maps)
    points = (*known, near_enough(maps[1], known[1], pck_of, 0.1)) if known else None
    with marked(out, "match", [picture]):
        write_picture(picture, photos, maps, matches, spread_out(maps[0], matches.mutual, lines), points)
    scores = pck(*maps, matches, *known, pck_of) if known else []
    if json:
        result = {"picture": str(picture), "pairs": _list_pairs(*maps, matches)}
        console.out_json(result | ({"keypoints": len(known[0]), "pck": [asdict(s) for s in scores]} if known else {}))
        return
    if known:
        title = f"PCK in percent of {len(known[0])} keypoints; threshold relative to the {pck_of}'s larger side"
        console.table(["threshold", "found", "same place", "chance"], _format_rows(scores), title=title)
    console.out(str(picture))


def _check_photos(*photos: Path) -> None:
    for photo in photos:
        if photo.is_dir() or not photo.exists():
            fault = "is a folder" if photo.is_dir() else "does not exist"
            raise DinoError(f"{photo} {fault}; expected a photo", "check the path")


def _parse(text: str) -> tuple[float, float]:
    try:
        x, y = map(float, text.split(","))
    except ValueError as error:
        raise Misuse(f"--point {text} is not valid; expected x and y in pixels", "such as --point 120,80") from error
    return x, y


def _check_points(points: Sequence[tuple[float, float]], path: Path, photo: Pixels) -> None:
    height, width = photo.shape[:2]
    for x, y in points:
        if not (0 <= x < width and 0 <= y < height):
            raise DinoError(
                f"--point {x:g},{y:g} is outside {path}, which has {width}x{height} pixels",
                f"use --point {width // 2},{height // 2}, or another point inside",
            )


def _draw_similarities(
    picture: Path,
    photos: tuple[Pixels, Pixels],
    maps: tuple[PatchMap, PatchMap],
    points: Sequence[tuple[float, float]],
    *,
    json: bool,
) -> None:
    from dinocli.apps.match.similar import draw_similarities
    from dinocli.data.sources.outputs import marked

    with marked(picture.parent, "match", [picture]):
        best = draw_similarities(picture, photos, maps, points)
    found = [
        {"x_a": xa, "y_a": ya, "x_b": round(xb, 1), "y_b": round(yb, 1), "cosine": round(cosine, 4)}
        for (xa, ya), ((xb, yb), cosine) in zip(points, best, strict=True)
    ]
    if json:
        console.out_json({"picture": str(picture), "points": found})
    else:
        console.table(list(found[0]), [[f"{value:g}" for value in one.values()] for one in found])
    print_saved([picture])


def _read(path: Path, encoder: Encoder) -> Pixels:
    from dinocli.data.decode.pixels import BadImage
    from dinocli.data.sources.photos import read_photo

    pixels = read_photo(path, encoder.images)
    if isinstance(pixels, BadImage):
        raise DinoError(f"{path} cannot be read: {pixels.reason}", "name a photo such as a .jpg")
    return pixels


def _format_rows(scores: list[Pck]) -> list[list[str]]:
    return [[f"{s.alpha:g}", f"{s.found:.1f}", f"{s.same_place:.1f}", f"{s.chance:.1f}"] for s in scores]


def _list_pairs(a: PatchMap, b: PatchMap, matches: Matches) -> list[dict[str, float]]:
    """Return the centers of mutual nearest patches in pixels of the photos, most similar first."""
    ours, theirs = a.centers[matches.mutual], b.centers[matches.forth[matches.mutual]]
    cosines = matches.cosine[matches.mutual].tolist()
    return [
        {"x_a": xa, "y_a": ya, "x_b": xb, "y_b": yb, "cosine": round(cosine, 4)}
        for (xa, ya), (xb, yb), cosine in zip(ours.round(1).tolist(), theirs.round(1).tolist(), cosines, strict=True)
    ]
