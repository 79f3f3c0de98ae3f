"""`dino export`: a trained backbone for other libraries."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Literal

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
    features_or_newest,
    one_checkpoint,
    output_place,
)
from dinocli.cli.places import images_place
from dinocli.cli.tables import write_tables
from dinocli.cli.words import Misuse
from dinocli.core.errors import DinoError
from dinocli.core.runs import CHECKPOINT

if TYPE_CHECKING:
    from dinocli.features.tabular import TableFormat
    from dinocli.weights.export import Format


def export(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="CHECKPOINT",
            help="Run folder, ckpt.safetensors, or official .pth; for parquet, csv and npy, a folder or file of "
            "features. Default: ./ckpt.safetensors or ./features, else those of the newest run.",
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
    any_size: Annotated[
        bool,
        typer.Option(
            "--any-size",
            help="For graphs: images of any height and width in whole patches, not only of --size.",
            rich_help_panel=METHOD,
        ),
    ] = False,
    precision: Annotated[
        Literal["float32", "float16", "int8"],
        typer.Option(
            help="With --to onnx: numbers of the graph. The command prints the cosine to float32 and the speed.",
            rich_help_panel=METHOD,
        ),
    ] = "float32",
    images: Annotated[
        str | None,
        typer.Option(
            help="With --precision: images that measure the cosine, and that calibrate int8; up to 256 are read. "
            "Default: noise, and int8 without calibration.",
            callback=images_place,
            rich_help_panel=METHOD,
        ),
    ] = None,
    overrides: ShapeSettings = None,
    *,
    to: Annotated[
        Literal["official", "timm", "transformers", "onnx", "torch-export", "parquet", "csv", "npy"],
        typer.Option(
            metavar="FORMAT",
            help="official: a .pth for facebookresearch/dino. timm: a folder that timm.create_model loads. "
            "transformers: a folder that AutoModel loads. onnx, torch-export: a graph from images to features. "
            "parquet, csv, npy: features of dino extract.",
            rich_help_panel=OUTPUT,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Output file, or folder for timm, transformers and features. Default: named after run and network; "
            "for features their own folder. Replaces an existing file, or a folder of an earlier export, but never the "
            "source.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Export a trained backbone for another library, load it with that library, and compare the features.

    Also writes stored features for other tools.

    Examples:
        dino export --to onnx
        dino export runs/tiny-1 --to official --projection-head --out tiny.pth
        dino export features --to parquet
    """
    if to == "parquet" or to == "csv" or to == "npy":
        _export_features(source, to, out, json=json)
        return
    graph = to in ("onnx", "torch-export")
    if projection_head and to != "official":
        raise Misuse(
            f"--projection-head needs --to official; this is --to {to}",
            "remove --projection-head, or use --to official",
        )
    if not graph and (tokens != "cls" or size or any_size):
        raise Misuse(
            "--tokens, --size and --any-size are only for the graphs of --to onnx and --to torch-export; this is "
            f"--to {to}",
            "remove them, or use --to onnx",
        )
    if precision != "float32" and to != "onnx":
        raise Misuse(f"--precision {precision} needs --to onnx; this is --to {to}", "remove it, or use --to onnx")
    if images and precision == "float32":
        raise Misuse("--images measures a reduced precision; this is --precision float32", "add --precision int8")
    source = checkpoint_or_newest(one_checkpoint(source, checkpoint))

    from dinocli.core.resources import format_bytes
    from dinocli.data.sources.open import open_source
    from dinocli.weights.export import ENDINGS, export
    from dinocli.weights.shipped import place_of

    name = _make_name(place_of(Path(source)), to, network, projection_head) + ENDINGS[to]
    target = output_place(out, file=name if ENDINGS[to] else "") if out else Path(name)
    done = export(
        source,
        to,
        target,
        which=network,
        heads=projection_head,
        tokens=tokens,
        size=size,
        any_size=any_size,
        precision=precision,
        images=open_source(images) if images else None,
        overrides=overrides or [],
    )
    for note in done.notes:
        console.say(f"note: {note}")
    exact = f"relative difference {done.difference:.1g}" if done.difference else "bit for bit"
    console.say(f"loaded with {_LIBRARY[to]}: the same features, {exact}")
    if reduced := done.reduced:
        console.say(
            f"{precision}: mean cosine {reduced.cosine:.5f} to float32, least {reduced.least:.5f}, on {reduced.images} "
            f"{'images of noise' if reduced.noise else 'images'}"
        )
        if reduced.batch_effect > 0.001:
            console.say(
                f"note: an image's features depend on the others in its batch: {reduced.batch_effect:.2g} standard "
                "deviations between alone and in a batch of 8; --images IMAGES avoids this"
            )
        console.say(
            f"{precision}: {reduced.milliseconds:.3g} ms per image on this CPU and {format_bytes(reduced.bytes)}; "
            f"float32 {reduced.milliseconds_float32:.3g} ms and {format_bytes(reduced.bytes_float32)}"
        )
    console.say(f"load: {done.load}")
    if json:
        measured = {"reduced": asdict(reduced)} if reduced else {}
        about = {"path": str(done.path), "difference": done.difference, "load": done.load, "notes": done.notes}
        console.out_json(about | measured)
    else:
        console.out(str(done.path))
    named = quote(source)  # a network with a convolutional stem has only the other forms, and cannot be pushed
    pushed = to in ("timm", "transformers")
    console.saved([done.path], f"dino push {named}" if pushed else f"dino compare {named} OTHER --on DATA")


def _export_features(source: str | None, to: TableFormat, out: Path | None, *, json: bool) -> None:
    from dinocli.features.store import INDEX, read_features, read_splits
    from dinocli.weights.identify import NAMES, WEIGHTS, kind_of

    if source and (kind := kind_of(source)) in WEIGHTS:
        again = f"dino extract {quote(source)} IMAGES --to {to}"
        raise DinoError(f"{source} is {NAMES[kind]}; expected features, which --to {to} writes", again)
    place = features_or_newest(Path(source) if source else None)
    single = place.is_file() or (place / INDEX).is_file()
    folder = output_place(out) if out else place.parent if single else place
    parts = {place.stem: read_features(place)} if single else read_splits(place)
    files = write_tables(parts, folder, to)
    if json:
        console.out_json({split: list(map(str, paths)) for split, paths in files.items()})
    else:
        for paths in files.values():
            console.out(str(paths[0]))
    written = (path for paths in files.values() for path in paths)
    console.saved(written, f"dino plot {quote(str(place))}")


_LIBRARY = {
    "official": "the original's network",
    "timm": "timm",
    "transformers": "transformers",
    "onnx": "onnxruntime",
    "torch-export": "torch.export",
}


def _make_name(source: Path, to: Format, network: str, heads: bool) -> str:
    """Return the run's or checkpoint's name, with suffixes for network, heads and format."""
    path = source.resolve()
    if path.name == CHECKPOINT:
        path = path.parent
    from dinocli.weights.export import ENDINGS

    # The format in the name keeps a .pth from overwriting its source, and a model folder distinct from the run's.
    form = to if not ENDINGS[to] or (to == "official" and path.suffix == ".pth") else ""
    tail = [network * (network == "student"), "heads" * heads, form]
    return "-".join([path.name if path.is_dir() else path.stem, *filter(None, tail)])
