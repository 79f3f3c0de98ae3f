"""`dino pack`: tar shards of images."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from dinocli import console
from dinocli.cli.options import Json, Limits, output_place
from dinocli.cli.places import images_place
from dinocli.cli.words import Misuse


def pack(
    images: Annotated[
        str,
        typer.Argument(
            metavar="IMAGES", callback=images_place, help="A folder of any depth, a list of files, or torchvision:NAME."
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the shards.")],
    side: Annotated[
        int | None,
        typer.Option(
            min=8,
            help="Resize images whose short side is longer to this many pixels, as JPEG (.npy if "
            "of neither three channels nor one); else all stay as they are.",
        ),
    ] = None,
    per_shard: Annotated[int, typer.Option(min=1, help="Images a shard.")] = 1000,
    name: Annotated[str, typer.Option(help="How the shards' names begin.")] = "images",
    overrides: Limits = None,
    json: Json = False,
) -> None:
    """Pack images into tar shards, for faster reading of large sets; the same command resumes."""
    if "/" in name or name.startswith("."):
        raise Misuse(
            f"--name {name} is a path; expected a plain name", f"--name {Path(name).name.lstrip('.') or 'images'}"
        )
    out = output_place(out, "OUT")
    from dinocli.data.sources import open_images

    source = open_images(images)
    console.notes(source.notes)

    import torch

    from dinocli.data.images import DEFAULTS
    from dinocli.packing import pack

    taken = DEFAULTS.changed(overrides or [])
    torch.set_num_threads(1)  # images are resized in parallel, one thread each
    with console.progress("pack", len(source), "images") as advance:
        packed = pack(source, out, side=side, per_shard=per_shard, name=name, images=taken, report=advance)
    for path, reason in packed.bad.items():
        console.say(f"note: left out {path}: {reason}")
    if packed.kept:
        console.say(f"kept {packed.kept} of {packed.shards} shards that were there")
    if packed.faster:
        how = "from the disk" if packed.cold else "from memory, where a disk's seeking does not show"
        console.say(f"the shards are read {packed.faster:.1f} times as fast as the files (measured {how})")
    console.say(f"next: dino pretrain {out}")
    if json:
        console.out_json({"path": str(out), **asdict(packed)})
    else:
        console.table(
            ["shards", "files", "images", "left out", "size", "time"],
            [
                [
                    str(out),
                    str(packed.shards),
                    str(packed.images),
                    str(len(packed.bad)),
                    console.size(packed.bytes),
                    console.duration(packed.seconds),
                ]
            ],
        )
