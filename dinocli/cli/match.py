"""`dino match`: patch correspondences between two photos."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dinocli.cli import console
from dinocli.cli.options import (
    Checkpoint,
    Device,
    FacetName,
    Json,
    NetworkName,
    Settings,
    ShortSide,
    encoder_from,
    output_place,
)
from dinocli.cli.places import photo_place
from dinocli.core.errors import DinoError

if TYPE_CHECKING:
    from dinocli.apps.match.correspond import Matches, PatchMap, Pck
    from dinocli.data.decode.pixels import Pixels
    from dinocli.features.encoder import Encoder


def match(
    a: Annotated[Path, typer.Argument(metavar="A", callback=photo_place, help="A photo.")],
    b: Annotated[Path, typer.Argument(metavar="B", callback=photo_place, help="Another photo, of any size.")],
    checkpoint: Checkpoint = None,
    out: Annotated[Path, typer.Option(help="Folder for the picture.")] = Path("matches"),
    keypoints: Annotated[
        Path | None,
        typer.Option(
            help="Corresponding points, for a PCK score: CSV or JSON with x_a, y_a, x_b, y_b; CSV with a photo and its "
            "x, y, x, y ... per row; or a homography from A to B (XML, or nine numbers in a .txt)."
        ),
    ] = None,
    pck_of: Annotated[
        Literal["box", "image"],
        typer.Option("--pck-of", help="PCK threshold relative to the larger side of B's keypoint box, or of B."),
    ] = "box",
    size: ShortSide = None,
    layer: Annotated[
        list[int] | None,
        typer.Option(help="Block whose patches are compared: 1 is the first, -1 the last; may be repeated."),
    ] = None,
    facet: FacetName = "token",
    pca: Annotated[int | None, typer.Option(min=1, help="Dimensions per patch after a PCA over both photos.")] = None,
    lines: Annotated[int, typer.Option(min=1, help="Approximate number of lines to draw.")] = 24,
    sd: Annotated[
        str | None,
        typer.Option(
            "--sd", metavar="MODEL", help="Concatenate features of a Stable Diffusion model: a folder, or a Hub name."
        ),
    ] = None,
    sd_weight: Annotated[
        float,
        typer.Option(min=0, max=1, help="Weight of the Stable Diffusion features; the DINO features get the rest."),
    ] = 0.5,
    sd_size: Annotated[int, typer.Option(min=64, help="Long side in pixels of the photos for Stable Diffusion.")] = 960,
    caption: Annotated[str, typer.Option(help="Caption of both photos for --sd; empty by default.")] = "",
    network: NetworkName = "teacher",
    overrides: Settings = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Match the patches of two photos by their features, draw the matches, and score them by known keypoints."""
    for photo in (a, b):
        if photo.is_dir() or not photo.exists():
            fault = "is a folder" if photo.is_dir() else "does not exist"
            raise DinoError(f"{photo} {fault}; expected a photo", "check the path")
    out = output_place(out)
    picture = out / f"{a.stem}-{b.stem}.png"
    from dinocli.apps.match.correspond import match as matched
    from dinocli.apps.match.correspond import near_enough, pck, spread_out
    from dinocli.apps.match.diffusion import load_diffusion
    from dinocli.apps.match.keypoints import read_keypoints
    from dinocli.apps.match.sheets import Compared, patch_maps, write_picture
    from dinocli.core.device import pick_device
    from dinocli.data.sources.outputs import marked
    from dinocli.data.sources.photos import spare

    spare([picture], [a, b])
    encoder = encoder_from(checkpoint, device, network, overrides)
    photos = _read(a, encoder), _read(b, encoder)
    known = keypoints and read_keypoints(keypoints, a, b, (photos[0].shape[:2], photos[1].shape[:2]))
    diffusion = load_diffusion(sd, pick_device(device), caption) if sd else None
    if sd and not caption:
        console.say("note: no --caption for the diffusion model; add one such as --caption 'a photo of a cat'")
    compared = Compared(tuple(layer or [-1]), facet, size, pca, diffusion, sd_weight, sd_size)
    maps = patch_maps(encoder, *photos, compared)
    matches = matched(*maps)
    points = (*known, near_enough(maps[1], known[1], pck_of, 0.1)) if known else None
    with marked(out, "match", [picture]):
        write_picture(picture, photos, maps, matches, spread_out(maps[0], matches.mutual, lines), points)
    scores = pck(*maps, matches, *known, pck_of) if known else []
    if json:
        result = {"picture": str(picture), "pairs": _pairs(*maps, matches)}
        console.out_json(result | ({"keypoints": len(known[0]), "pck": [asdict(s) for s in scores]} if known else {}))
        return
    if known:
        title = f"PCK in percent of {len(known[0])} keypoints; threshold relative to the {pck_of}'s larger side"
        console.table(["threshold", "found", "same place", "chance"], _rows(scores), title=title)
    console.out(str(picture))


def _read(path: Path, encoder: Encoder) -> Pixels:
    from dinocli.data.decode.pixels import BadImage
    from dinocli.data.sources.photos import read_photo

    pixels = read_photo(path, encoder.images)
    if isinstance(pixels, BadImage):
        raise DinoError(f"{path} cannot be read: {pixels.reason}", "name a photo such as a .jpg")
    return pixels


def _rows(scores: list[Pck]) -> list[list[str]]:
    return [[f"{s.alpha:g}", f"{s.found:.1f}", f"{s.same_place:.1f}", f"{s.chance:.1f}"] for s in scores]


def _pairs(a: PatchMap, b: PatchMap, matches: Matches) -> list[dict[str, float]]:
    """Return the centers of mutual nearest patches in pixels of the photos, most similar first."""
    ours, theirs = a.centers[matches.mutual], b.centers[matches.forth[matches.mutual]]
    cosines = matches.cosine[matches.mutual].tolist()
    return [
        {"x_a": xa, "y_a": ya, "x_b": xb, "y_b": yb, "cosine": round(cosine, 4)}
        for (xa, ya), (xb, yb), cosine in zip(ours.round(1).tolist(), theirs.round(1).tolist(), cosines, strict=True)
    ]
