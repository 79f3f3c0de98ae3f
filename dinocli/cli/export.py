"""`dino export`: a trained backbone for other libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from dinocli.cli import console
from dinocli.cli.layout import METHOD, OUTPUT
from dinocli.cli.options import (
    Json,
    NetworkName,
    SameCheckpoint,
    ShapeSettings,
    Size,
    Tokens,
    checkpoint_or_newest,
    one_checkpoint,
    output_place,
)
from dinocli.cli.words import Misuse
from dinocli.core.runs import CHECKPOINT


def export(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="CHECKPOINT",
            help="Run folder, ckpt.safetensors, or official .pth. Default: ./ckpt.safetensors, else the newest run.",
        ),
    ] = None,
    checkpoint: SameCheckpoint = None,
    network: NetworkName = "teacher",
    tokens: Tokens = "cls",
    size: Size = None,
    projection_head: Annotated[
        bool,
        typer.Option(
            "--projection-head",
            help="With --to official: include the projection head, as in a full checkpoint.",
            rich_help_panel=METHOD,
        ),
    ] = False,
    overrides: ShapeSettings = None,
    *,
    to: Annotated[
        Literal["official", "timm", "onnx", "torch-export"],
        typer.Option(
            metavar="FORMAT",
            help="official: a .pth for facebookresearch/dino. timm: a folder that timm.create_model loads. "
            "onnx, torch-export: a graph from images to features.",
            rich_help_panel=OUTPUT,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Output file, or folder for timm. Default: named after the run and network. Replaces an "
            "existing file, or a folder of an earlier export, but never the source.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Export a trained backbone for another library, load it with that library, and compare the features.

    Examples:
        dino export --to onnx
        dino export runs/tiny-1 --to official --projection-head --out tiny.pth
    """
    graph = to in ("onnx", "torch-export")
    if projection_head and to != "official":
        raise Misuse(
            f"--projection-head needs --to official; this is --to {to}",
            "remove --projection-head, or use --to official",
        )
    if not graph and (tokens != "cls" or size):
        raise Misuse(
            f"--tokens and --size are only for the graphs of --to onnx and --to torch-export; this is --to {to}",
            "remove them, or use --to onnx",
        )
    source = checkpoint_or_newest(one_checkpoint(source, checkpoint))

    from dinocli.weights.export import ENDINGS, export

    name = _make_name(Path(source), to, network, projection_head) + ENDINGS[to]
    target = output_place(out, file="" if to == "timm" else name) if out else Path(name)
    done = export(
        source, to, target, which=network, heads=projection_head, tokens=tokens, size=size, overrides=overrides or []
    )
    for note in done.notes:
        console.say(f"note: {note}")
    exact = f"relative difference {done.difference:.1g}" if done.difference else "bit for bit"
    console.say(f"loaded with {_LIBRARY[to]}: the same features, {exact}")
    console.say(f"load: {done.load}")
    if json:
        console.out_json(
            {"path": str(done.path), "difference": done.difference, "load": done.load, "notes": done.notes}
        )
    else:
        console.out(str(done.path))


_LIBRARY = {"official": "the original's network", "timm": "timm", "onnx": "onnxruntime", "torch-export": "torch.export"}


def _make_name(source: Path, to: str, network: str, heads: bool) -> str:
    """Return the run's or checkpoint's name, with suffixes for network, heads and format."""
    path = source.resolve()
    if path.name == CHECKPOINT:
        path = path.parent
    # The format in the name keeps a .pth from overwriting its source, and a timm folder distinct from the run's.
    form = to if to == "timm" or (to == "official" and path.suffix == ".pth") else ""
    tail = [network * (network == "student"), "heads" * heads, form]
    return "-".join([path.name if path.is_dir() else path.stem, *filter(None, tail)])
