"""`dino eval copies`: scores of copy detection."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from dinocli.cli import console
from dinocli.cli.layout import METHOD
from dinocli.cli.options import Checkpoint, Device, Json, NetworkName, Settings, encoder_from


def copies(
    folder: Annotated[
        Path,
        typer.Argument(metavar="COPIES", help="Folder laid out like Copydays: original/ beside folders of copies."),
    ],
    distractors: Annotated[
        Path | None,
        typer.Option(help="Folder of distractor images, searched together with the originals.", rich_help_panel=METHOD),
    ] = None,
    whiten: Annotated[
        Path | None,
        typer.Option(
            help="Folder of images on which to fit a whitening of the features. Default: no whitening.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    checkpoint: Checkpoint = None,
    network: NetworkName = "teacher",
    size: Annotated[
        int | None,
        typer.Option(
            min=8,
            help="Side in pixels of the square network input. Default: 320/224 of the training size.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    overrides: Settings = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Score a network by copy detection: mAP and micro-AP of finding the originals of edited copies.

    Examples:
        dino eval copies ./copydays --checkpoint runs/vits16-1
        dino eval copies ./copydays --distractors ./others --whiten ./more
    """
    from dinocli.apps.search.copies import copies
    from dinocli.features.encoder import quick

    encoder = quick(encoder_from(checkpoint, device, network, overrides), "float32", compiled=False)
    patch = encoder.backbone.patch_size
    side = size or round(encoder.size * 320 / 224 / patch) * patch
    said = ""

    def report(what: str, done: int, total: int) -> None:
        nonlocal said
        if done == total or what != said:
            console.say(f"{what}: {done} of {total} images")
        said = what

    result = copies(encoder, folder, distractors=distractors, whiten=whiten, size=side, report=report)
    console.skipped(result.skipped)
    if json:
        console.out_json({"size": side, **asdict(result)})
        return
    rows = [[s.kind, f"{s.mean_ap:.2f}", f"{s.micro_ap:.2f}", str(s.queries)] for s in result.scores]
    whitened = f"whitened by {result.whitened}" if result.whitened else "not whitened"
    among = f"{result.originals} originals among {result.distractors} others"
    console.table(
        ["copies", "mAP %", "micro-AP %", "queries"],
        rows,
        title=f"copy detection by {encoder.source}: {among}, {whitened}, {side} pixels",
    )
    console.saved([], "dino compare RUN OTHER --on DATA")
