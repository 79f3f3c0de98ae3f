"""`dino pack`: shards of images, as tar files or as decoded pixels."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from dinocli.cli import console
from dinocli.cli.layout import METHOD
from dinocli.cli.options import Json, Limits, output_place
from dinocli.cli.places import images_place
from dinocli.cli.words import Misuse
from dinocli.core.resources import format_bytes

_LISTED = 5  # most unreadable images that are printed one by one


def pack(
    images: Annotated[
        str,
        typer.Argument(
            metavar="IMAGES", callback=images_place, help="A folder of any depth, a list of files, or torchvision:NAME."
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the shards.")],
    pixels: Annotated[
        bool,
        typer.Option(
            "--pixels",
            help="Store decoded pixels instead of files, so that training needs no decoding. They take several times "
            "the space of JPEGs.",
            rich_help_panel=METHOD,
        ),
    ] = False,
    short_side: Annotated[
        int | None,
        typer.Option(
            min=8,
            help="Resize images with a longer short side to this many pixels, and store them as JPEG (.npy unless "
            "they have 1 or 3 channels). Default: store all files unchanged; with --pixels, 448.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    per_shard: Annotated[int, typer.Option(min=1, help="Images per shard.", rich_help_panel=METHOD)] = 1000,
    name: Annotated[str, typer.Option(help="Prefix of the shards' names.", rich_help_panel=METHOD)] = "images",
    overrides: Limits = None,
    json: Json = False,
) -> None:
    """Pack images into shards, for faster reading of large sets; the same command resumes.

    Examples:
        dino pack ./images shards
        dino pack ./images pixels --pixels
        dino pack ./images shards --short-side 256 --per-shard 5000
    """
    if not re.fullmatch(r"\w[\w.-]*", name):
        plain = re.sub(r"[^\w.-]+", "-", Path(name).name).lstrip(".-").rstrip("-")
        raise Misuse(
            f"--name {name!r} is not a plain name; expected letters, digits, '-', '_' and '.', as for a file",
            f"--name {plain or 'images'}",
        )
    out = output_place(out, "OUT")
    from dinocli.data.sources.open import open_images, refuse_clash, within

    source = open_images(images)
    refuse_clash(source)

    import torch

    from dinocli.apps.pack import SETTINGS, pack
    from dinocli.data.images import DEFAULTS
    from dinocli.data.loader.batch import BadFiles

    taken = DEFAULTS.changed(overrides or [])
    source = within(source, taken)
    console.notes(source.notes)
    torch.set_num_threads(1)  # images are resized in parallel, one thread each
    try:
        with console.progress("pack", len(source), "images") as advance:
            packed = pack(
                source, out, side=short_side, per_shard=per_shard, name=name, images=taken, pixels=pixels,
                report=advance, note=console.say,
            )  # fmt: skip
    except KeyboardInterrupt:
        console.say(f"{out} is not complete; run the same command to resume")
        raise
    if len(packed.bad) > _LISTED:
        console.say(
            f"note: skipped {len(packed.bad)} images that could not be read: {BadFiles(packed.bad).summary()}; "
            f"{out / SETTINGS} lists them"
        )
    else:
        console.skipped(packed.bad)
    if packed.kept:
        console.say(f"reused {packed.kept} of {packed.shards} shards from an earlier call")
    if packed.faster:
        how = "from disk" if packed.cold else "from memory, without the disk's seek times"
        console.say(f"reading the shards is {packed.faster:.1f} times as fast as reading the files (measured {how})")
    if json:
        console.out_json({"path": str(out), **asdict(packed)})
    else:
        console.table(
            ["shards", "files", "images", "skipped", "size", "time"],
            [
                [
                    str(out),
                    str(packed.shards),
                    str(packed.images),
                    str(len(packed.bad)),
                    format_bytes(packed.bytes),
                    console.duration(packed.seconds),
                ]
            ],
        )
    console.saved([out], f"dino pretrain {quote(str(out))}")
