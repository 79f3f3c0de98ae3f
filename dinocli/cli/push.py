"""`dino push`: a model folder for the Hugging Face Hub."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from dinocli.cli import console
from dinocli.cli.layout import METHOD, OUTPUT
from dinocli.cli.options import Json, SameCheckpoint, checkpoint_or_newest, one_checkpoint, output_place
from dinocli.cli.places import is_weights, run_before_out
from dinocli.cli.words import Misuse


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
    upload: Annotated[
        str | None,
        typer.Option(
            metavar="USER/NAME",
            help="Also upload the folder to this repository of the hub. Needs a token: hf auth login, or HF_TOKEN.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    private: Annotated[
        bool,
        typer.Option("--private", help="With --upload: only you can see a new repository.", rich_help_panel=OUTPUT),
    ] = False,
    json: Json = False,
) -> None:
    """Write a model folder that timm loads from the Hugging Face Hub, with a model card; upload it only with --upload.

    Examples:
        dino push
        dino push runs/tiny-1 my-birds --features features
        dino push runs/tiny-1 --upload USER/my-birds --private
    """
    if private and not upload:
        raise Misuse("--private is for the repository of --upload, which is not set", "add --upload USER/NAME")
    if source and checkpoint and not out and not is_weights(source):
        out, source = Path(source), None  # with --checkpoint, the only argument is OUT
    given = one_checkpoint(source, checkpoint)
    out = out and output_place(out, "OUT")
    if upload:
        from dinocli.apps.hub.upload import check_upload

        check_upload(upload)
    taken = checkpoint_or_newest(given)

    from dinocli.apps.hub.push import CARD, push
    from dinocli.apps.hub.upload import upload as send

    done = push(taken, out, features, upload)
    exact = f"relative difference {done.difference:.1g}" if done.difference else "bit for bit"
    console.say(f"loaded with timm: the same features, {exact}")
    address = send(done.path, upload, private=private) if upload else None
    if json:
        knn = done.measured and asdict(done.measured.knn)
        about = {"path": str(done.path), "name": done.name, "difference": done.difference, "knn": knn}
        console.out_json(about | ({"address": address} if address else {}))
    else:
        console.out(str(done.path))
    console.say(f"check {address or done.path / CARD}, and set a license there")
    console.saved(
        filter(None, [done.path, address]),
        "" if address else f"hf upload USER/{done.name} {shlex.quote(str(done.path))}",
    )
