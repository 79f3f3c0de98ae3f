"""`dino eval segment`: overlap of foregrounds with masks, and a linear head for pixel classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from dinocli.cli import console
from dinocli.cli.layout import METHOD, OUTPUT
from dinocli.cli.options import (
    Checkpoint,
    Device,
    Json,
    Mass,
    NetworkName,
    Settings,
    ShortSide,
    Tau,
    encoder_from,
    output_place,
)
from dinocli.cli.places import photo_places
from dinocli.cli.segment import Foreground
from dinocli.cli.words import Misuse
from dinocli.core.errors import DinoError

if TYPE_CHECKING:
    from dinocli.features.encoder import Encoder


def segment(
    images: Annotated[
        list[Path] | None,
        typer.Argument(metavar="IMAGES...", callback=photo_places, help="Photos, and folders of photos, for --truth."),
    ] = None,
    truth: Annotated[
        Path | None,
        typer.Option(
            metavar="MASKS",
            help="Score the foregrounds of photos against the masks in this folder, named like the photos.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    train: Annotated[
        Path | None,
        typer.Option(
            metavar="DATA",
            help="Train and score a linear head on images/ and masks/ (index PNGs) in this folder, with train/ and "
            "val/ or a tenth held out; writes head.safetensors.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    checkpoint: Checkpoint = None,
    network: NetworkName = "teacher",
    by: Annotated[
        Foreground | None,
        typer.Option(help="With --truth: method that finds the foreground. Default: both.", rich_help_panel=METHOD),
    ] = None,
    mass: Mass = 0.6,
    tau: Tau = 0.2,
    epochs: Annotated[int, typer.Option(min=1, help="With --train: training epochs.", rich_help_panel=METHOD)] = 100,
    seed: Annotated[
        int,
        typer.Option(
            min=0, help="With --train: seed of the photos' order and of the held-out photos.", rich_help_panel=METHOD
        ),
    ] = 0,
    short_side: ShortSide = None,
    overrides: Settings = None,
    device: Device = "auto",
    out: Annotated[
        Path, typer.Option(help="With --train: folder for head.safetensors.", rich_help_panel=OUTPUT)
    ] = Path("segments"),
    json: Json = False,
) -> None:
    """Score a network by segmentation: foregrounds against masks, or a linear head trained on pixel classes.

    Examples:
        dino eval segment ./photos --truth ./masks
        dino eval segment --train ./data --checkpoint ckpt.safetensors
    """
    if bool(truth) == bool(train):
        got = "both" if train else "neither"
        raise Misuse(
            f"dino eval segment takes --truth or --train; got {got}",
            "dino eval segment IMAGES --truth MASKS, or dino eval segment --train DATA",
        )
    if train and images:
        raise Misuse(f"--train reads photos from its own folder; unexpected {images[0]}", "omit the photos")
    if truth and not images:
        raise Misuse(
            "no photos given; expected photos or folders of photos", f"dino eval segment IMAGES --truth {truth}"
        )
    out = output_place(out)
    if truth:
        from dinocli.data.sources.photos import named_photos

        notes: list[str] = []
        files = named_photos(images or [], notes)
        console.notes(notes)

    from dinocli.data.sources.outputs import marked
    from dinocli.evals.attention import default_size

    encoder = encoder_from(checkpoint, device, network, overrides)
    side = short_side or default_size(encoder)
    if truth:
        _score_overlap(encoder, files, truth, [by] if by else _list_methods(encoder), side, mass, tau, json=json)
    elif train:
        with marked(out, "segment", []):
            _train_head(encoder, train, out, side, epochs, seed, json=json)


def _list_methods(encoder: Encoder) -> list[Foreground]:
    from dinocli.models.transformer import Transformer

    if isinstance(encoder.backbone, Transformer):
        return ["attention", "cut", "border"]
    console.say("note: a convolutional network has no attention; evaluating the cut and the border only")
    return ["cut", "border"]


def _score_overlap(
    encoder: Encoder,
    files: Mapping[Path, Path],
    truth: Path,
    ways: Sequence[Foreground],
    side: int,
    mass: float,
    tau: float,
    *,
    json: bool,
) -> None:
    from dinocli.apps.segment.overlap import overlaps
    from dinocli.data.sources.masks import MaskFolder, with_masks

    pairs, skipped = with_masks(files, MaskFolder(truth))
    with console.progress("measure", len(pairs), "images") as advance:
        result = overlaps(encoder, pairs, ways, short_side=side, keep=mass, tau=tau, report=advance)
    skipped |= result.skipped
    console.skipped(skipped)
    if not result.each:
        raise DinoError(
            f"none of {len(files)} photos has a mask of its name and size in {truth}", "name each mask like its photo"
        )
    if json:
        each = {str(path): scores for path, scores in result.each.items()}
        reasons = {str(path): reason for path, reason in skipped.items()}
        console.out_json({"jaccard": result.means, "photos": len(each), "each": each, "skipped": reasons})
        return
    console.table(
        ["foreground by", "Jaccard"],
        [[way, f"{mean:.3f}"] for way, mean in result.means.items()],
        title=f"overlap with the masks of {len(result.each)} photos, by {encoder.source} at {side} pixels",
    )
    console.saved([], "dino segment IMAGES")


def _train_head(encoder: Encoder, root: Path, out: Path, side: int, epochs: int, seed: int, *, json: bool) -> None:
    from dinocli.apps.segment.linear_head import HEAD, train_head, write_head
    from dinocli.apps.segment.pairs import labelled_set

    with console.progress("segment", 100, "%") as advance:

        def report(stage: str, done: int, of: int) -> None:
            # First percent and share of each stage; the features take about half of the time.
            first, share = {"masks": (0, 5), "features": (5, 45), "train": (50, 30), "measure": (80, 20)}[stage]
            advance(first + share * done // of, f"{stage} {done}/{of}")

        data = labelled_set(root, seed=seed, report=lambda done, of: report("masks", done, of))
        head, result = train_head(
            encoder, data, out / "patches", short_side=side, epochs=epochs, seed=seed, report=report
        )
    path = out / HEAD
    write_head(path, head)
    console.skipped(result.skipped)
    if result.split_off:
        console.say(f"note: the data has no val/; {result.val_photos} of its photos were held out")
    if json:
        console.out_json(asdict(result) | {"path": str(path)})
    else:
        console.table(
            ["class", "IoU %", f"IoU %, all {result.commonest}"],
            [[name, f"{iou:.1f}", f"{result.baseline.iou[name]:.1f}"] for name, iou in result.head.iou.items()],
            title=f"linear segmentation head on {encoder.source} at {side} pixels: {result.train_photos} training and "
            f"{result.val_photos} validation photos",
        )
        console.table(
            ["", "mIoU %", "pixels right %"],
            [
                ["head", f"{result.head.miou:.2f}", f"{result.head.accuracy:.2f}"],
                [f"all {result.commonest}", f"{result.baseline.miou:.2f}", f"{result.baseline.accuracy:.2f}"],
            ],
        )
        console.out(str(path))
    console.saved([path], f"dino segment IMAGES --classifier {quote(str(path))}")
