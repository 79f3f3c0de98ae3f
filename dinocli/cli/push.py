"""`dino push`: a model folder for the Hugging Face Hub."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from dinocli.cli import console
from dinocli.cli.layout import METHOD
from dinocli.cli.options import Json, SameCheckpoint, checkpoint_or_newest, one_checkpoint, output_place
from dinocli.cli.places import is_weights, run_before_out


def push(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="CHECKPOINT",
            callback=run_before_out,
            help="Run folder or ckpt.safetensors. Default: ./ckpt.safetensors, else the newest run.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Argument(
            metavar="OUT",
            help="Output folder, which also names the model. Default: the run's name plus -hub. Replaces the output "
            "of an earlier push, unless its card was edited.",
        ),
    ] = None,
    checkpoint: SameCheckpoint = None,
    features: Annotated[
        Path | None,
        typer.Option(
            help="Folder of features made with these weights; adds their k-NN accuracy to the card.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Write a model folder that timm loads from the Hugging Face Hub, with a model card. Nothing is uploaded.

    Examples:
        dino push
        dino push runs/tiny-1 my-birds --features features
    """
    if source and checkpoint and not out and not is_weights(source):
        out, source = Path(source), None  # with --checkpoint, the only argument is OUT
    given = one_checkpoint(source, checkpoint)
    out = out and output_place(out, "OUT")
    taken = checkpoint_or_newest(given)

    from dinocli.apps.hub.push import CARD, push

    done = push(taken, out, features)
    exact = f"relative difference {done.difference:.1g}" if done.difference else "bit for bit"
    console.say(f"loaded with timm: the same features, {exact}")
    console.say(f"check {done.path / CARD}, and set a license there")
    console.say(f"next: hf upload USER/{done.name} {shlex.quote(str(done.path))}")
    if json:
        knn = done.measured and asdict(done.measured.knn)
        console.out_json({"path": str(done.path), "name": done.name, "difference": done.difference, "knn": knn})
    else:
        console.out(str(done.path))
