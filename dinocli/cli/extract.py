"""`dino extract`: features of images, stored on disk."""

from __future__ import annotations

import re
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Literal

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
    note_inside,
    one_checkpoint,
    output_place,
)
from dinocli.cli.places import checkpoint_and_images
from dinocli.cli.tables import write_tables
from dinocli.core.errors import DinoError

if TYPE_CHECKING:
    from dinocli.data.sources.indexed import Images
    from dinocli.features.extract import Extracted
    from dinocli.features.tabular import TableFormat


def extract(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="[CHECKPOINT] DATA",
            callback=checkpoint_and_images,
            help="CHECKPOINT: run folder, ckpt.safetensors, official .pth of DINO or DINOv2, timm:NAME, or "
            "dinocli:mini. Default: ./ckpt.safetensors, else the newest run. DATA: images as for `dino pretrain`; "
            "class folders become labels, train/ and val/ become splits.",
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
    part: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Extract only part I of N, from 1/N to N/N, for job arrays; --merge joins them.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    merge: Annotated[
        bool,
        typer.Option(
            "--merge",
            is_eager=True,
            help="Join all parts of --part; then the arguments are folders with parts, or parts.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    to: Annotated[
        Literal["safetensors", "parquet", "csv", "npy"],
        typer.Option(
            help="Also write each split in this format, for other tools, beside the file that dino's commands read.",
            rich_help_panel=OUTPUT,
        ),
    ] = "safetensors",
    json: Json = False,
) -> None:
    """Extract features of images into one file per split, with labels, class names and paths.

    Repeat a command that was interrupted, and it resumes.

    Examples:
        dino extract ckpt.safetensors ./data
        dino extract ckpt.safetensors ./data --part 3/8
        dino extract --merge features
        dino extract ckpt.safetensors ./data --to parquet
        dino extract timm:vit_small_patch14_dinov2.lvd142m ./data --size 224
    """
    if merge:
        _merge([Path(place) for place in paths], output_place(out), to, json)
        return
    from dinocli.data.sources.open import splits, within

    numbered = _parse_part(part)
    given = one_checkpoint(paths[0] if len(paths) == 2 else None, checkpoint)
    out = output_place(out)
    if to != "safetensors":
        from dinocli.features.tabular import check_format

        check_format(to, tokens)
    if numbered and to != "safetensors":
        raise DinoError(f"--to {to} needs all features, and --part {part} extracts some", f"--to {to} with --merge")
    data = paths[-1]
    parts = splits(data)
    note_inside(out, data)

    from dinocli.apps.doctor.inspection import warn_of
    from dinocli.core.device import default_workers, pick_device
    from dinocli.core.distributed import rank
    from dinocli.data.sources.indexed import Images
    from dinocli.data.sources.outputs import marked
    from dinocli.features.encoder import quick, whole_patches
    from dinocli.features.extract import count_in_part, extract
    from dinocli.features.parts import part_path
    from dinocli.features.store import learned_from
    from dinocli.features.unfinished import forget
    from dinocli.features.writer import WHOLE, Part

    picked = pick_device(device)
    encoder = encoder_from(given, device, network, overrides)
    size = whole_patches(encoder, size)
    encoder = quick(encoder, precision, compiled=compiled and compiles(picked, asked=True))
    share = Part(*numbered) if numbered else WHOLE
    batch = batch_size or (64 if picked.type == "cpu" else 256)
    written, places = [], {}
    parts = {name: within(source, encoder.images) for name, source in parts.items()}
    console.notes(note for source in parts.values() for note in source.notes)
    for name, source in parts.items():
        whole = out / f"{name}.safetensors"
        places[name] = part_path(whole, share) if numbered else whole
        _note_replaced(places[name], encoder.fingerprint)
        for line in warn_of(source, encoder.images) if rank() == 0 else ():
            console.say(f"note: {f'{name}: ' if len(parts) > 1 else ''}{line}")
        with (
            marked(out, "extract"),
            console.progress(f"extract {name}", count_in_part(source.count or 0, batch, share), "images") as advance,
        ):
            written.append(
                extract(
                    encoder,
                    source,
                    places[name],
                    data=data,
                    tokens=tokens,
                    blocks=blocks,
                    size=size,
                    dtype=dtype,
                    views=views if name == learned_from(parts) else 0,
                    seed=seed,
                    batch_size=batch,
                    part=share,
                    recording=len(parts) > 1,
                    report=advance,
                    say=console.say,
                    workers=default_workers(picked) if workers is None else workers,
                )
            )
        if isinstance(source, Images) and source.metadata and rank() == 0:
            _write_metadata(out / f"{name}-columns.csv", source, f"{name}/" if len(parts) > 1 else "")
    for place in places.values() if rank() == 0 else ():
        forget(place)
    features = quote(str(out))
    following = f"dino plot {features}"
    if tokens == "patches":
        following = f"dino export {features} --to npy"
    elif any(source.classes for source in parts.values()):
        following = f"dino knn --features {features}"
    if numbered:
        console.say(f"part {numbered[0]} of {share.of}; when all are there, join them")
        _show(written, out, to, f"dino extract --merge {features} --out {features}", json)
    else:
        _show(written, out, to, following, json)


def _merge(places: list[Path], out: Path, to: TableFormat | Literal["safetensors"], json: bool) -> None:
    """Join the parts in some folders, split by split.

    Raises:
        DinoError: If a place is a checkpoint, or its parts cannot be joined.
    """
    from dinocli.weights.identify import WEIGHTS, kind_of

    for place in places:
        if kind_of(str(place)) in WEIGHTS:
            raise DinoError(
                f"--merge joins folders of parts, and {place} is a checkpoint",
                f"dino extract --merge {out} --out {out}",
            )
    from dinocli.data.sources.outputs import marked
    from dinocli.features.parts import find_parts, join
    from dinocli.features.store import provenance_at

    joined = []
    for name, paths in find_parts(places).items():
        if made := provenance_at(paths[0]):
            _note_replaced(out / f"{name}.safetensors", made.fingerprint)
        with marked(out, "extract"), console.progress(f"merge {name}", 0, "images") as advance:
            joined.append(join(paths, out / f"{name}.safetensors", advance))
    _show(joined, out, to, f"dino knn --features {quote(str(out))}", json)


def _note_replaced(path: Path, fingerprint: str) -> None:
    """Print a note if a path holds features of other weights, which this command replaces."""
    from dinocli.core.distributed import rank
    from dinocli.features.store import provenance_at

    before = provenance_at(path) if rank() == 0 else None
    if before and before.fingerprint != fingerprint:
        console.say(f"note: replacing {path}, the features of other weights: {before.maker}; --out keeps both")


def _parse_part(given: str | None) -> tuple[int, int] | None:
    """Return the numbers I and N of --part.

    Raises:
        DinoError: If they are not numbers, or I is not one of 1 to N.
    """
    if given is None:
        return None
    found = re.fullmatch(r"(\d+)/(\d+)", given.strip())
    if not found or not 1 <= int(found[1]) <= int(found[2]) or found[2] == "1":
        raise DinoError(f"--part {given} is invalid; expected I/N with I from 1 to N, and N at least 2", "--part 1/8")
    return int(found[1]), int(found[2])


def _show(
    written: list[Extracted], out: Path, to: TableFormat | Literal["safetensors"], following: str, json: bool
) -> None:
    """Write the tables of --to, and print what was written and the command to run next."""
    from dinocli.core.distributed import rank
    from dinocli.features.store import read_features

    files = {}
    if to != "safetensors" and rank() == 0:
        files = write_tables({part.path.stem: read_features(part.path) for part in written}, out, to)
    for part in written:
        console.skipped(part.skipped)
        console.notes(part.notes)
    if json:
        console.out_json(
            [
                {"path": str(p.path), "images": p.images, "shape": p.shape, "skipped": p.skipped}
                | ({"files": list(map(str, files[p.path.stem]))} if files else {})
                for p in written
            ]
        )
    else:
        console.table(
            ["features", "images", "shape of each", "skipped"],
            [[str(p.path), str(p.images), "x".join(map(str, p.shape)), str(len(p.skipped))] for p in written],
        )
    made = [path for paths in files.values() for path in paths]
    console.saved([*(part.path for part in written), *made], following)


def _write_metadata(path: Path, source: Images, prefix: str) -> None:
    """Write the further columns of a list next to the features, as `dino plot --table` reads them."""
    from dinocli.core.tables import write_table

    rows = zip((prefix + name for name in source.names), *source.metadata.values(), strict=True)
    write_table(path, ["path", *source.metadata], rows)
    console.say(f"columns {', '.join(source.metadata)}: {path}; color by one with dino plot --table {path}")
