"""`dino compare`: figures of several networks on the same images, with a verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dinocli.cli import console
from dinocli.cli.layout import METHOD, OUTPUT
from dinocli.cli.options import (
    Device,
    EncoderBatch,
    EncoderPrecision,
    Json,
    NetworkName,
    Settings,
    Size,
    Workers,
    encoder_from,
    output_place,
)
from dinocli.cli.places import images_place, network_places

if TYPE_CHECKING:
    from dinocli.apps.compare.compare import Comparison, Figures
    from dinocli.apps.compare.features import Setting
    from dinocli.features.encoder import Encoder
    from dinocli.features.store import Features


def compare(
    networks: Annotated[
        list[str],
        typer.Argument(
            metavar="A B...",
            callback=network_places,
            help="Networks: run folders, checkpoints, official files, or timm:NAME. All others are "
            "compared with the first.",
        ),
    ],
    data: Annotated[
        str,
        typer.Option(
            "--on",
            metavar="DATA",
            callback=images_place,
            help="Images as for `dino extract`: class folders become labels, train/ and val/ become splits.",
            rich_help_panel=METHOD,
        ),
    ],
    k: Annotated[
        int | None,
        typer.Option(
            "--k",
            min=1,
            help="Number of nearest neighbours that vote. Default: 20, or all if fewer.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    probe: Annotated[
        bool, typer.Option("--linear/--no-linear", help="Train a linear probe on each network.", rich_help_panel=METHOD)
    ] = True,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the linear probes.", rich_help_panel=METHOD)] = 0,
    network: NetworkName = "teacher",
    size: Size = None,
    overrides: Settings = None,
    batch_size: EncoderBatch = None,
    precision: EncoderPrecision = "bfloat16",
    workers: Workers = None,
    device: Device = "auto",
    out: Annotated[
        Path, typer.Option(help="Folder for the page, the picture and the features.", rich_help_panel=OUTPUT)
    ] = Path("compare"),
    json: Json = False,
) -> None:
    """Compare networks on the same images: k-NN, linear probe, figures without labels, speed and size.

    The verdict is based on a paired bootstrap over the test images. Stored features are reused if they match: those of
    an earlier comparison, and those of `dino extract`.

    Examples:
        dino compare runs/tiny-1 runs/tiny-2 --on ./data
        dino compare runs/tiny-1 timm:vit_small_patch16_224.dino --on ./data
    """
    from dinocli.data.images import DEFAULTS
    from dinocli.data.sources.open import splits

    out = output_place(out)
    parts = splits(data, DEFAULTS)  # the networks may differ in their settings
    console.notes(note for source in parts.values() for note in source.notes)

    from dinocli.apps.compare.compare import compare
    from dinocli.apps.compare.features import Setting
    from dinocli.apps.compare.page import PAGE, PICTURE, list_rows, write_page
    from dinocli.core.device import default_workers, pick_device
    from dinocli.data.sources.outputs import marked
    from dinocli.features.encoder import quick

    picked = pick_device(device)
    setting = Setting(
        data,
        parts,
        out / "features",
        size,
        batch_size or (64 if picked.type == "cpu" else 256),
        default_workers(picked) if workers is None else workers,
    )
    if not setting.viewed:
        console.say("note: no LiDAR: tar shards cannot be sampled")
    with marked(out, "compare", [out / PICTURE]):
        encoders = [
            quick(encoder_from(name, device, network, overrides), precision, compiled=False) for name in networks
        ]
        prepared = [_prepare(encoder, name, setting) for encoder, name in zip(encoders, networks, strict=True)]
        figures = _measure(encoders, networks, setting, prepared)
        with console.progress("linear", 100, "%") as advance:
            result = compare(
                data,
                figures,
                [features for features, _ in prepared],
                k=k,
                probe=probe,
                seed=seed,
                device=picked,
                report=lambda done, total: advance(100 * done // total, f"step {done}/{total}"),
            )
        write_page(result, parts[result.split], out, encoders[0].images)
    if json:
        console.out_json(_list_figures(result) | {"page": str(out / PAGE)})
    else:
        console.table(["figure", *networks], list_rows(result), title=_format_title(result))
        for line in result.verdicts:
            console.out(line)
    console.saved([out / PAGE], "dino finetune DATA --from WEIGHTS")


def _prepare(encoder: Encoder, name: str, setting: Setting) -> tuple[dict[str, Features], Features | None]:
    """Return the features of a network by split, and of random views of a sample unless the images are tar shards."""
    from dinocli.apps.compare.features import prepare, prepare_views

    total = sum(source.count or 0 for source in setting.parts.values())
    with console.progress(f"encode {name}", total, "images") as advance:
        prepared = prepare(encoder, setting, advance)
    if prepared.reused:
        console.say(f"features of {name}: {prepared.reused}")
    console.skipped(prepared.skipped)
    sample = sum(source.count or 0 for source in setting.viewed.values())
    with console.progress(f"views of {name}", sample, "images") as advance:
        views = prepare_views(encoder, setting, advance)
    return prepared.features, next(iter(views.features.values())) if views else None


def _measure(
    encoders: Sequence[Encoder],
    names: Sequence[str],
    setting: Setting,
    prepared: Sequence[tuple[dict[str, Features], Features | None]],
) -> list[Figures]:
    """Return the figures of all networks that need no labels; equal networks are timed once."""
    from dinocli.apps.compare.compare import measure
    from dinocli.apps.compare.speed import time_encoders

    identities = [setting.identify(encoder) for encoder in encoders]
    different = dict(zip(identities, encoders, strict=True))
    sizes = [setting.size or encoder.size for encoder in different.values()]
    timed = time_encoders(list(zip(different.values(), sizes, strict=True)), setting.batch_size)
    speeds = dict(zip(different, timed, strict=True))
    return [
        measure(encoder, name, identity, setting.size or encoder.size, speeds[identity], features, views)
        for encoder, name, identity, (features, views) in zip(encoders, names, identities, prepared, strict=True)
    ]


def _format_title(result: Comparison) -> str:
    if result.k is None:
        return f"{result.images} images of {result.data}, without labels"
    classes = f"{result.images} images of {len(result.test.classes)} classes"
    how = "each by all others (leave-one-out)" if result.leave_one_out else f"by {result.voters} training images"
    return f"{classes} in {result.data}, {how}, k = {result.k}; in parentheses: difference and 95 % interval"


def _list_figures(result: Comparison) -> dict[str, Any]:
    """Return the result for JSON."""
    networks = [
        asdict(figures)
        | {
            "differences": {
                metric: {"difference": d.mean, "low": d.low, "high": d.high, "changed": d.changed, "verdict": d.verdict}
                for metric, d in differences.items()
            }
        }
        for figures, differences in zip(result.networks, result.differences, strict=True)
    ]
    about = {"data": result.data, "k": result.k, "images": result.images, "training_images": result.voters}
    return about | {"leave_one_out": result.leave_one_out, "networks": networks, "verdicts": result.verdicts}
