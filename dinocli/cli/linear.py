"""`dino linear`: linear probe on frozen features."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from dinocli.cli import console
from dinocli.cli.layout import METHOD
from dinocli.cli.options import (
    Checkpoint,
    Device,
    FeatureFolder,
    Json,
    Settings,
    Size,
    Tokens,
    Workers,
    encoder_from,
    features_or_newest,
)
from dinocli.cli.places import images_place
from dinocli.core.errors import DinoError

if TYPE_CHECKING:
    from dinocli.evals.linear import LinearResult


def linear(
    features: FeatureFolder = None,
    epochs: Annotated[int, typer.Option(min=1, help="Training epochs.", rich_help_panel=METHOD)] = 100,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Images per step. Default: 256, or 1024 with --paper.", rich_help_panel=METHOD),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            min=0, help="Seed of the initial weights, the image order and the held-out split.", rich_help_panel=METHOD
        ),
    ] = 0,
    paper: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            callback=images_place,
            help="Run the paper's protocol instead: SGD on augmented images of this folder (train/ and val/ with class "
            "folders). Reads no features.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    checkpoint: Checkpoint = None,
    lr: Annotated[
        float, typer.Option(min=0, help="With --paper: learning rate for a batch size of 256.", rich_help_panel=METHOD)
    ] = 0.001,
    blocks: Annotated[
        int,
        typer.Option(min=1, help="With --paper: concatenate the tokens of the last N blocks.", rich_help_panel=METHOD),
    ] = 4,
    tokens: Tokens = "cls",
    size: Size = None,
    overrides: Settings = None,
    workers: Workers = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Train a linear probe: on stored features with a learning-rate sweep, or by the paper's protocol (--paper).

    Examples:
        dino linear --features features
        dino linear --paper ./data --checkpoint ckpt.safetensors --blocks 4
    """
    if not paper and (checkpoint or size or overrides or (lr, blocks, tokens) != (0.001, 4, "cls")):
        raise DinoError(
            "--checkpoint, --lr, --blocks, --tokens, --size and --set need images (--paper)",
            "use --paper DATA; for stored features, set them in `dino extract`",
        )

    if paper:
        from dinocli.data.sources.open import Images, splits

        parts = {name: part for name, part in splits(paper).items() if isinstance(part, Images)}
        test = parts.get("val") or parts.get("test")
        if "train" not in parts or test is None:
            raise DinoError(
                f"{paper} has {', '.join(parts) or 'no split'}; expected train/ and val/ with class folders",
                "arrange the images as DATA/train/CLASS/* and DATA/val/CLASS/*",
            )

        from dinocli.core.device import default_workers, pick_device  # these import torch
        from dinocli.evals.linear_paper import linear_on_images
        from dinocli.features.encoder import whole_patches

        picked = pick_device(device)
        encoder = encoder_from(checkpoint, device, "teacher", overrides)
        size = whole_patches(encoder, size)
        with console.progress("linear", 100, "%") as advance:
            result = linear_on_images(
                encoder,
                parts["train"],
                test,
                tokens=tokens,
                blocks=blocks,
                size=size,
                epochs=epochs,
                lr=lr,
                batch_size=batch_size or 1024,
                workers=default_workers(picked) if workers is None else workers,
                seed=seed,
                report=lambda done, total: advance(100 * done // total, f"step {done}/{total}"),
            )
        source = encoder.source
    else:
        folder = features_or_newest(features)

        from dinocli.features.store import compared, read_splits, unlabelled

        stored = read_splits(folder)
        console.notes(unlabelled(stored))
        train, held = compared(stored)

        from dinocli.core.device import pick_device  # these import torch
        from dinocli.evals.linear import linear

        with console.progress("linear", 100, "%") as advance:
            result = linear(
                train,
                held,
                epochs=epochs,
                batch_size=batch_size or 256,
                seed=seed,
                device=pick_device(device),
                report=lambda done, total: advance(100 * done // total, f"step {done}/{total}"),
            )
        source = train.provenance.maker
    if json:
        console.out_json(asdict(result))
    else:
        _print(result, source)


def _print(result: LinearResult, source: str) -> None:
    if result.sweep:
        console.say(
            f"learning rate {result.lr:g}: the best of {len(result.sweep)} on {result.held_out} images held out of the "
            f"training split; then trained on all {result.train_images}"
        )
    if result.split_off:
        console.say(f"note: the data has one split; held out {result.test_images} images as the test split")
    console.table(
        ["protocol", "learning rate", "top-1 %", "top-5 %"],
        [[result.protocol, f"{result.lr:g}", f"{result.top1:.2f}", f"{result.top5:.2f}"]],
        title=f"linear probe of {source}: {result.train_images} training and {result.test_images} test images of "
        f"{result.classes} classes",
    )
