"""`dino match`: patch correspondences between two photos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dinocli.cli import console
from dinocli.cli.layout import METHOD, OUTPUT
from dinocli.cli.options import (
    Checkpoints,
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
from dinocli.cli.points import Point, Points, check_points, parse_points
from dinocli.cli.words import Misuse
from dinocli.core.errors import DinoError

if TYPE_CHECKING:
    from dinocli.apps.match.correspond import Matches, PatchMap, Pck
    from dinocli.apps.match.diffusion import Diffusion as DiffusionModel
    from dinocli.apps.match.sheets import Compared
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
    checkpoint: Checkpoints = None,
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
    point: Points = None,
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
    points = parse_points(point)
    if len(checkpoint or []) > 1 and not points:
        raise Misuse(
            f"{len(checkpoint or [])} checkpoints; matches are drawn for one",
            "remove one, or compare them with --point X,Y",
        )
    names: Sequence[str | None] = checkpoint or [None]
    options = [NetworkOptions(name, network, overrides, device) for name in names]
    patches = PatchOptions(short_side, layer, facet, pca)
    diffusion = DiffusionOptions(sd, sd_weight, sd_long_side, caption)
    if points:
        _draw_similarities(a, b, options, patches, diffusion, out, points, json=json)
    else:
        match_photos(a, b, options[0], patches, diffusion, out, lines, json=json)


def match_photos(
    a: Path,
    b: Path,
    options: NetworkOptions,
    patches: PatchOptions,
    diffusion: DiffusionOptions,
    out: Path,
    lines: int,
    *,
    keypoints: Path | None = None,
    pck_of: Literal["box", "image"] = "box",
    json: bool,
) -> None:
    """Match two photos, and draw the matches; score them if keypoints are given."""
    picture = _place_picture(a, b, out)
    from dinocli.apps.match.correspond import match as matched
    from dinocli.apps.match.correspond import near_enough, pck, spread_out
    from dinocli.apps.match.keypoints import read_keypoints
    from dinocli.apps.match.sheets import patch_maps, write_picture
    from dinocli.data.sources.outputs import marked

    encoder = options.encoder()
    photos = _read(a, encoder), _read(b, encoder)
    known = keypoints and read_keypoints(keypoints, a, b, (photos[0].shape[:2], photos[1].shape[:2]))
    maps = patch_maps(encoder, *photos, _choose_features(patches, diffusion, options.device))
    matches = matched(*maps)
    points = (*known, near_enough(maps[1], known[1], pck_of, 0.1)) if known else None
    with marked(out, "match", [picture]):
        write_picture(picture, photos, maps, matches, spread_out(maps[0], matches.mutual, lines), points)
    scores = pck(*maps, matches, *known, pck_of) if known else []
    if json:
        result = {"picture": str(picture), "pairs": _list_pairs(*maps, matches)}
        console.out_json(result | ({"keypoints": len(known[0]), "pck": [asdict(s) for s in scores]} if known else {}))
    elif known:
        title = f"PCK in percent of {len(known[0])} keypoints; threshold relative to the {pck_of}'s larger side"
        console.table(["threshold", "found", "same place", "chance"], _format_rows(scores), title=title)
    if not json:
        console.out(str(picture))
    console.saved([picture], "dino match PHOTO OTHER_PHOTO --point X,Y")


def _place_picture(a: Path, b: Path, out: Path, suffix: str = "") -> Path:
    """Check the photos and the output folder, without writing, and return the path of the picture."""
    for photo in (a, b):
        if photo.is_dir() or not photo.exists():
            fault = "is a folder" if photo.is_dir() else "does not exist"
            raise DinoError(f"{photo} {fault}; expected a photo", "check the path")
    picture = output_place(out) / f"{a.stem}-{b.stem}{suffix}.png"
    from dinocli.data.sources.photos import spare

    spare([picture], [a, b])
    return picture


def _choose_features(patches: PatchOptions, diffusion: DiffusionOptions, device: str) -> Compared:
    """Return the settings of the features to compare, with the diffusion model loaded if there is one."""
    from dinocli.apps.match.sheets import Compared

    model: DiffusionModel | None = None
    if diffusion.model:
        from dinocli.apps.match.diffusion import load_diffusion
        from dinocli.core.device import pick_device

        model = load_diffusion(diffusion.model, pick_device(device), diffusion.caption or "")
        if not diffusion.caption:
            console.say("note: no --caption set for the diffusion model; add one, such as --caption 'a photo of a cat'")
    layers = tuple(patches.layers or [-1])
    return Compared(
        layers, patches.facet, patches.short_side, patches.pca, model, diffusion.weight, diffusion.long_side
    )


def _draw_similarities(
    a: Path,
    b: Path,
    options: Sequence[NetworkOptions],
    patches: PatchOptions,
    diffusion: DiffusionOptions,
    out: Path,
    points: Sequence[Point],
    *,
    json: bool,
) -> None:
    """Draw the similarities of points of A to all patches of both photos, for each network."""
    picture = _place_picture(a, b, out, "-similarity")
    from dinocli.apps.match.sheets import patch_maps
    from dinocli.apps.match.similar import draw_similarities
    from dinocli.data.sources.outputs import marked

    encoders = [one.encoder() for one in options]
    photos = [(_read(a, encoder), _read(b, encoder)) for encoder in encoders]
    check_points(points, a, photos[0][0])
    compared = _choose_features(patches, diffusion, options[0].device)
    maps = [
        (encoder.source, patch_maps(encoder, *pair, compared)) for encoder, pair in zip(encoders, photos, strict=True)
    ]
    with marked(picture.parent, "match", [picture]):
        best = draw_similarities(picture, photos[0], maps, points)
    found = [
        {"checkpoint": name, "x_a": xa, "y_a": ya, "x_b": round(xb, 1), "y_b": round(yb, 1), "cosine": round(cosine, 4)}
        for (name, _), of_network in zip(maps, best, strict=True)
        for (xa, ya), ((xb, yb), cosine) in zip(points, of_network, strict=True)
    ]
    if json:
        console.out_json({"picture": str(picture), "points": found})
    else:
        columns = list(found[0])[len(encoders) == 1 :]
        cells = [[one[key] for key in columns] for one in found]
        console.table(columns, [[cell if isinstance(cell, str) else f"{cell:g}" for cell in row] for row in cells])
    console.saved([picture], "dino attn-map IMAGES --point X,Y")


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
