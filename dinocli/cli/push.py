"""`dino push`: a model folder for the Hugging Face Hub."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from dinocli import console
from dinocli.cli.options import Json, checkpoint_or_newest, output_place
from dinocli.cli.places import run_before_out


def push(
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="[RUN]",
            callback=run_before_out,
            help="Run folder or ckpt.safetensors; the newest weights if absent.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Argument(
            metavar="[OUT]",
            help="Folder to write, which names the model; the run's name with -hub if absent. What an earlier push "
            "made there is replaced, unless its card was changed.",
        ),
    ] = None,
    features: Annotated[
        Path | None, typer.Option(help="Folder of features of these weights, whose k-NN goes into the card.")
    ] = None,
    json: Json = False,
) -> None:
    """Write a model folder that timm loads from the Hugging Face Hub, with a card of its training; upload nothing."""
    out = out and output_place(out, "OUT")
    source = checkpoint_or_newest(run)

    from dinocli.pushing import CARD, push

    done = push(source, out, features)
    exact = f"to {done.difference:.1g} of their length" if done.difference else "bit by bit"
    console.say(f"loaded again by timm: the same features, {exact}")
    console.say(f"look at {done.path / CARD}, and name a licence there")
    console.say(f"next: hf upload USER/{done.name} {shlex.quote(str(done.path))}")
    if json:
        knn = done.measured and asdict(done.measured.knn)
        console.out_json({"path": str(done.path), "name": done.name, "difference": done.difference, "knn": knn})
    else:
        console.out(str(done.path))
