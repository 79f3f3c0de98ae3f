"""`dino push`: a model folder for the Hugging Face Hub."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from dinocli.cli import console
from dinocli.cli.options import Json, checkpoint_or_newest, output_place
from dinocli.cli.places import run_before_out


def push(
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="[RUN]",
            callback=run_before_out,
            help="Run folder or ckpt.safetensors; by default the newest weights.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Argument(
            metavar="[OUT]",
            help="Output folder, which names the model; by default the run's name with -hub. Output of an earlier push "
            "is replaced unless its card was edited.",
        ),
    ] = None,
    features: Annotated[
        Path | None, typer.Option(help="Folder of features of these weights; adds their k-NN accuracy to the card.")
    ] = None,
    json: Json = False,
) -> None:
    """Write a model folder that timm loads from the Hugging Face Hub, with a model card. Nothing is uploaded."""
    out = out and output_place(out, "OUT")
    source = checkpoint_or_newest(run)

    from dinocli.apps.hub.push import CARD, push

    done = push(source, out, features)
    exact = f"relative difference {done.difference:.1g}" if done.difference else "bit for bit"
    console.say(f"loaded with timm: the same features, {exact}")
    console.say(f"check {done.path / CARD}, and set a license there")
    console.say(f"next: hf upload USER/{done.name} {shlex.quote(str(done.path))}")
    if json:
        knn = done.measured and asdict(done.measured.knn)
        console.out_json({"path": str(done.path), "name": done.name, "difference": done.difference, "knn": knn})
    else:
        console.out(str(done.path))
