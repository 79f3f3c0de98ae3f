"""`dino attn-map`: what the class token looks at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dinocli import console
from dinocli.cli.options import Checkpoint, Device, Json, Limits, NetworkName, checkpoint_or_newest
from dinocli.errors import DinoError


def attn_map(
    images: Annotated[list[Path], typer.Argument(help="Photos, and folders of photos.")],
    checkpoint: Checkpoint = None,
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("attention"),
    keep: Annotated[float, typer.Option(min=0.01, max=1, help="Share of the attention that the masks hold.")] = 0.6,
    size: Annotated[
        int | None,
        typer.Option(
            min=8,
            help="Short side in pixels to look at the photo with; 480 for a network "
            "trained at 224, in that proportion for others.",
        ),
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Write the maps themselves too, as safetensors.")] = False,
    network: NetworkName = "teacher",
    overrides: Limits = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Draw the attention of each head in the last block: beside the photo, in color, and as masks."""
    from dinocli.data.named import named_photos

    files = named_photos(images)

    from dinocli.attention_pictures import draw
    from dinocli.device import pick_device
    from dinocli.encoder import with_images
    from dinocli.loading import load_encoder

    encoder = load_encoder(checkpoint_or_newest(checkpoint), pick_device(device), network)
    encoder = with_images(encoder, overrides or [])
    drawn, skipped = [], {}
    with console.progress("attn-map", len(files), "images") as advance:
        for done, (path, name) in enumerate(files.items(), 1):
            result = draw(encoder, path, out / name, keep=keep, size=size, raw=raw)
            if isinstance(result, str):
                skipped[str(path)] = result
            else:
                drawn.append(result)
            advance(done)
    for bad, reason in skipped.items():
        console.say(f"note: skipped {bad}: {reason}")
    if not drawn:
        raise DinoError("none of the images can be read", "name a photo such as a .jpg")
    if json:
        console.out_json(
            [{"image": str(d.image), "picture": str(d.picture), "raw": d.raw and str(d.raw)} for d in drawn]
        )
    else:
        for d in drawn:
            console.out(str(d.picture))
