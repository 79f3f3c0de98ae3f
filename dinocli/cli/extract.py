"""`dino extract`: features of images, stored on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from dinocli.cli import console
from dinocli.cli.layout import METHOD, OUTPUT, SPEED
from dinocli.cli.options import (
    Device,
    EncoderBatch,
    EncoderPrecision,
    Json,
    NetworkName,
    SameCheckpoint,
    Settings,
    Size,
    Tokens,
    Workers,
    compiles,
    encoder_from,
    one_checkpoint,
    output_place,
)
from dinocli.cli.places import checkpoint_and_images


def extract(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="[CHECKPOINT] DATA",
            callback=checkpoint_and_images,
            help="CHECKPOINT: run folder, ckpt.safetensors, official .pth of DINO or DINOv2, or timm:NAME. Default: "
            "./ckpt.safetensors, else the newest run. DATA: images as for `dino pretrain`; class folders become "
            "labels, train/ and val/ become splits.",
        ),
    ],
    checkpoint: SameCheckpoint = None,
    network: NetworkName = "teacher",
    tokens: Tokens = "cls",
    blocks: Annotated[
        int, typer.Option(min=1, help="Concatenate the tokens of the last N blocks.", rich_help_panel=METHOD)
    ] = 1,
    size: Size = None,
    views: Annotated[
        int,
        typer.Option(
            min=0,
            help="Also store features of N random views of each training image, for `dino linear`; each view costs as "
            "much as the image itself.",
            rich_help_panel=METHOD,
        ),
    ] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random views of --views.", rich_help_panel=METHOD)] = 0,
    overrides: Settings = None,
    batch_size: EncoderBatch = None,
    precision: EncoderPrecision = "bfloat16",
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Compile the transformer blocks with torch.compile (about a minute to start).",
            rich_help_panel=SPEED,
        ),
    ] = False,
    workers: Workers = None,
    device: Device = "auto",
    out: Annotated[Path, typer.Option(help="Folder for the feature files.", rich_help_panel=OUTPUT)] = Path("features"),
    dtype: Annotated[
        Literal["float32", "float16"],
        typer.Option(help="Type of the stored numbers; float16 takes half the space.", rich_help_panel=OUTPUT),
    ] = "float32",
    json: Json = False,
) -> None:
    """Extract features of images into one file per split, with labels, class names and paths.

    Examples:
        dino extract ckpt.safetensors ./data
        dino extract timm:vit_small_patch14_dinov2.lvd142m ./data --size 224
    """
    from dinocli.data.sources.open import splits

    given = one_checkpoint(paths[0] if len(paths) == 2 else None, checkpoint)
    out = output_place(out)
    data = paths[-1]
    parts = splits(data)
    console.notes(note for source in parts.values() for note in source.notes)

    from dinocli.apps.doctor.inspection import warn_of
    from dinocli.core.device import default_workers, pick_device
    from dinocli.core.distributed import rank
    from dinocli.data.sources.outputs import marked
    from dinocli.features.encoder import quick, whole_patches
    from dinocli.features.extract import extract
    from dinocli.features.store import learned_from

    picked = pick_device(device)
    encoder = encoder_from(given, device, network, overrides)
    size = whole_patches(encoder, size)
    encoder = quick(encoder, precision, compiled=compiled and compiles(picked, asked=True))
    written = []
    for name, source in parts.items():
        for line in warn_of(source, encoder.images) if rank() == 0 else ():
            console.say(f"note: {f'{name}: ' if len(parts) > 1 else ''}{line}")
        with marked(out, "extract"), console.progress(f"extract {name}", source.count or 0, "images") as advance:
            written.append(
                extract(
                    encoder,
                    source,
                    out / f"{name}.safetensors",
                    data=data,
                    tokens=tokens,
                    blocks=blocks,
                    size=size,
                    dtype=dtype,
                    views=views if name == learned_from(parts) else 0,
                    seed=seed,
                    batch_size=batch_size or (64 if picked.type == "cpu" else 256),
                    report=advance,
                    workers=default_workers(picked) if workers is None else workers,
                )
            )
    for part in written:
        console.skipped(part.skipped)
        console.notes(part.notes)
    if json:
        console.out_json(
            [{"path": str(p.path), "images": p.images, "shape": p.shape, "skipped": p.skipped} for p in written]
        )
    else:
        console.table(
            ["features", "images", "shape of each", "skipped"],
            [[str(p.path), str(p.images), "x".join(map(str, p.shape)), str(len(p.skipped))] for p in written],
        )
