"""`dino eval match`: PCK scores of patch correspondences."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from dinocli.cli.layout import METHOD
from dinocli.cli.match import (
    Caption,
    Diffusion,
    DiffusionOptions,
    DiffusionSide,
    DiffusionWeight,
    Dimensions,
    Layers,
    Lines,
    PatchOptions,
    PhotoA,
    PhotoB,
    Pictures,
    match_photos,
)
from dinocli.cli.options import Checkpoint, Device, FacetName, Json, NetworkName, NetworkOptions, Settings, ShortSide


def match(
    a: PhotoA,
    b: PhotoB,
    keypoints: Annotated[
        Path,
        typer.Option(
            help="Corresponding points: CSV or JSON with x_a, y_a, x_b, y_b; CSV with a photo and its x, y, x, y ... "
            "per row; or a homography from A to B (XML, or nine numbers in a .txt).",
            rich_help_panel=METHOD,
        ),
    ],
    pck_of: Annotated[
        Literal["box", "image"],
        typer.Option(
            "--pck-of",
            help="Scale of the PCK threshold: larger side of the box around B's keypoints, or of photo B (image).",
            rich_help_panel=METHOD,
        ),
    ] = "box",
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
    out: Pictures = Path("matches"),
    lines: Lines = 24,
    json: Json = False,
) -> None:
    """Score the patch matches of two photos against known keypoints (PCK), and draw matches and keypoints.

    Examples:
        dino eval match a.jpg b.jpg --keypoints points.csv
        dino eval match a.jpg b.jpg --keypoints H.txt --pck-of image --json
    """
    options = NetworkOptions(checkpoint, network, overrides, device)
    patches = PatchOptions(short_side, layer, facet, pca)
    diffusion = DiffusionOptions(sd, sd_weight, sd_long_side, caption)
    match_photos(a, b, options, patches, diffusion, out, lines, keypoints=keypoints, pck_of=pck_of, json=json)
