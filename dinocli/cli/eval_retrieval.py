"""`dino eval retrieval`: retrieval scores by the protocol of the revisited Oxford and Paris sets."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from dinocli.cli import console
from dinocli.cli.layout import METHOD
from dinocli.cli.options import Checkpoint, Device, Json, NetworkName, Settings, encoder_from


def retrieval(
    truth: Annotated[
        Path,
        typer.Argument(metavar="GND", help="Ground truth: gnd_roxford5k.pkl, gnd_rparis6k.pkl, or the same as JSON."),
    ],
    images: Annotated[
        Path | None,
        typer.Option("--images", help="Folder of the images. Default: jpg/ beside GND.", rich_help_panel=METHOD),
    ] = None,
    checkpoint: Checkpoint = None,
    network: NetworkName = "teacher",
    long_side: Annotated[
        int | None,
        typer.Option(
            min=8, help="Long side in pixels of the resized photos. Default: the training size.", rich_help_panel=METHOD
        ),
    ] = None,
    multiscale: Annotated[
        bool,
        typer.Option("--multiscale", help="Sum the features of each image at three sizes.", rich_help_panel=METHOD),
    ] = False,
    overrides: Settings = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Score a network by image retrieval: mAP and mP@k of the revisited Oxford and Paris protocol.

    Examples:
        dino eval retrieval gnd_roxford5k.pkl --checkpoint runs/vits16-1
        dino eval retrieval gnd.json --images ./photos --multiscale
    """
    from dinocli.apps.search.retrieval import KS, read_ground_truth, retrieval
    from dinocli.features.encoder import quick

    encoder = quick(encoder_from(checkpoint, device, network, overrides), "float32", compiled=False)
    read = read_ground_truth(truth)
    folder = images or truth.parent / "jpg"
    side, total = long_side or encoder.size, len(read.images) + len(read.queries)
    with console.progress("encode", total, "images") as advance:
        scores, skipped = retrieval(encoder, read, folder, size=side, multiscale=multiscale, report=advance)
    console.skipped(skipped)
    if json:
        console.out_json(
            {"size": side, "multiscale": multiscale, "scores": [asdict(s) for s in scores], "skipped": skipped}
        )
        return
    rows = []
    for s in scores:
        numbers = ["-" if n is None else f"{n:.2f}" for n in (s.mean_ap, *(s.precisions or (None for _ in KS)))]
        rows.append([s.level, *numbers, str(s.queries)])
    title = (
        f"retrieval by {encoder.source}: {len(read.images)} images, longest side {side}" + ", three sizes" * multiscale
    )
    console.table(["level", "mAP %", *(f"mP@{k} %" for k in KS), "queries"], rows, title=title)
    console.saved([], "dino compare RUN OTHER --on DATA")
