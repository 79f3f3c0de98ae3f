"""`dino demo`: generate images, pretrain, extract and evaluate."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from dinocli.cli import console
from dinocli.cli.layout import OUTPUT
from dinocli.cli.options import Device, Json, Workers, output_place
from dinocli.core.errors import DinoError


def demo(
    workers: Workers = None,
    device: Device = "auto",
    out: Annotated[
        Path,
        typer.Option(
            help="Folder for images, run, features and pictures: a new one, or that of a demo to resume.",
            rich_help_panel=OUTPUT,
        ),
    ] = Path("dino-demo"),
    json: Json = False,
) -> None:
    """Generate an image set, pretrain on it without labels, and compare the features with baselines.

    The same command resumes a stopped demo.

    Examples:
        dino demo
        dino demo --out second-demo --device cpu
    """
    out = output_place(out)
    from dinocli.data.sources.outputs import is_fresh, marked

    # Checked before torch is loaded, to fail at once.
    if not is_fresh(out) and not (out / "demo.json").exists():
        raise DinoError(f"{out} exists and holds no demo to resume", f"use --out {out}-2, or remove {out}")

    from dinocli.apps.demo.demo import PRESET, demo
    from dinocli.core.device import default_workers, pick_device

    picked = pick_device(device)
    count = default_workers(picked) if workers is None else workers
    try:
        with marked(out, "demo"):
            result = demo(out, device=picked, workers=count, stage=console.progress, note=console.say)
    except KeyboardInterrupt:
        console.say(f"the demo in {out} is not finished; run the same command to resume it")
        raise
    if json:
        console.out_json(asdict(result) | {"folder": str(result.folder), "pictures": [str(p) for p in result.pictures]})
    else:
        console.table(
            ["features", "k-NN top-1 %", "linear top-1 %", "attention on the object (Jaccard)"],
            [
                [r.features, f"{r.knn:.1f}", f"{r.linear:.1f}", "" if r.overlap is None else f"{r.overlap:.3f}"]
                for r in result.rows
            ],
            title=f"generated images of ten classes; chance is {result.chance:.0f} %, "
            f"a mask of the whole image has Jaccard {result.everything:.3f}",
        )
        console.say(f"done in {console.duration(result.seconds)}; attention maps: {result.pictures[0].parent}")
    console.saved([result.folder], f"dino pretrain ./images --preset {PRESET}")
