"""`dino segment`: drawings of foregrounds, patch features as colors, and pixel classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
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
    Photos,
    Settings,
    ShortSide,
    Tau,
    encoder_from,
    output_place,
)
from dinocli.cli.words import Misuse
from dinocli.core.errors import DinoError

if TYPE_CHECKING:
    from dinocli.apps.segment.sheets import Segmented
    from dinocli.features.encoder import Encoder

Foreground = Literal["cut", "border", "attention"]


def segment(
    images: Photos,
    checkpoint: Checkpoint = None,
    network: NetworkName = "teacher",
    by: Annotated[
        Literal["cut", "border", "attention", "pca"],
        typer.Option(
            help="cut: foreground by a normalized cut of patch keys (TokenCut). border: foreground by the distance "
            "from the features at the photo's border. attention: foreground by the attention of the class token. "
            "pca: patch features as colors, by one PCA over all photos.",
            rich_help_panel=METHOD,
        ),
    ] = "cut",
    classifier: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Draw pixel classes instead, predicted by this head.safetensors of `dino eval segment --train`.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    foreground: Annotated[
        Foreground, typer.Option(help="With --by pca: method that finds the foreground.", rich_help_panel=METHOD)
    ] = "cut",
    mass: Mass = 0.6,
    tau: Tau = 0.2,
    short_side: ShortSide = None,
    overrides: Settings = None,
    device: Device = "auto",
    out: Annotated[Path, typer.Option(help="Folder for the pictures.", rich_help_panel=OUTPUT)] = Path("segments"),
    masks: Annotated[
        bool, typer.Option("--masks", help="Also write each mask as a PNG at the photo's size.", rich_help_panel=OUTPUT)
    ] = False,
    json: Json = False,
) -> None:
    """Segment photos and draw the result: the foreground, patch features as colors, or pixel classes.

    Examples:
        dino segment ./photos --masks
        dino segment ./photos --by pca --short-side 480
    """
    if by == "pca" and (masks or classifier):
        other = "--masks" if masks else "--classifier"
        raise Misuse(f"{other} cannot be combined with --by pca", f"omit {other} or --by pca")
    out = output_place(out)

    from dinocli.data.sources.photos import named_photos, spare

    notes: list[str] = []
    files = named_photos(images, notes)
    console.notes(notes)
    if by == "pca":
        # A sheet shows several photos, so some of these names stay unused.
        made = [out / "pca.png", *(out / f"pca-{number}.png" for number in range(2, 1 + len(files)))]
        spare(made[:1], files)
    else:
        spare((out / f"{name}{end}" for name in files.values() for end in (".png", "-mask.png")), files)
        made = [out / f"{name}{end}" for name in files.values() for end in ([".png", "-mask.png"][: 1 + masks])]

    from dinocli.data.sources.outputs import marked
    from dinocli.evals.attention import default_size

    encoder = encoder_from(checkpoint, device, network, overrides)
    side = short_side or default_size(encoder)
    with marked(out, "segment", made):
        if by == "pca":
            _draw_pca(encoder, files, out, foreground, side, mass, tau, json=json)
        elif classifier:
            from dinocli.apps.segment.linear_head import read_head
            from dinocli.apps.segment.sheets import draw_classes

            layer = read_head(classifier, encoder)
            classes = partial(draw_classes, encoder, layer, short_side=short_side, masks=masks)
            _draw_each(files, out, classes, json=json)
        else:
            from dinocli.apps.segment.sheets import draw_foreground

            one = partial(draw_foreground, encoder, by=by, keep=mass, tau=tau, short_side=side, masks=masks)
            why, other = ("all patches are", "--tau 0.4") if by == "cut" else ("patches at the border are", "--by cut")
            _draw_each(files, out, one, remedy=f"{why} similar; try {other}", json=json)


def _draw_each(
    files: Mapping[Path, Path],
    out: Path,
    draw: Callable[[Path, Path], Segmented | str],
    *,
    remedy: str = "",
    json: bool,
) -> None:
    drawn: list[Segmented] = []
    skipped: dict[Path, str] = {}
    with console.progress("segment", len(files), "images") as advance:
        for done, (path, name) in enumerate(files.items(), 1):
            result = draw(path, out / name)
            if isinstance(result, str):
                skipped[path] = result
            else:
                drawn.append(result)
            advance(done)
    console.skipped(skipped)
    if not drawn:
        raise DinoError("none of the images can be read", "name a photo such as a .jpg")
    empty = [d.image for d in drawn if d.shares.get("foreground") == 0]
    if empty:
        others = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
        console.say(f"note: no foreground found in {empty[0]}{others}: {remedy}")
    if json:
        console.out_json(
            [
                {"image": str(d.image), "picture": str(d.picture), "mask": d.mask and str(d.mask), "shares": d.shares}
                for d in drawn
            ]
        )
    else:
        for d in drawn:
            console.out(str(d.picture))
    console.saved((path for d in drawn for path in (d.picture, d.mask) if path), "dino match PHOTO OTHER_PHOTO")


def _draw_pca(
    encoder: Encoder,
    files: Mapping[Path, Path],
    out: Path,
    by: Foreground,
    side: int,
    mass: float,
    tau: float,
    *,
    json: bool,
) -> None:
    from dinocli.apps.segment.colors import PHOTOS, fit_colors
    from dinocli.apps.segment.sheets import draw_colors

    photos = list(files)
    with console.progress("fit the colors", min(len(photos), PHOTOS), "images") as advance:
        colors = fit_colors(encoder, photos, side, by, keep=mass, tau=tau, report=advance)
    if colors.least is None:
        console.say("note: no foreground found in any photo; the PCA includes all patches")
    with console.progress("draw", len(photos), "images") as advance:
        pages, skipped = draw_colors(encoder, colors, photos, out, short_side=side, report=advance)
    console.skipped(skipped)
    if json:
        console.out_json({"pictures": [str(page) for page in pages], "photos": len(photos) - len(skipped)})
    else:
        for page in pages:
            console.out(str(page))
    console.saved(pages, "dino match PHOTO OTHER_PHOTO")
