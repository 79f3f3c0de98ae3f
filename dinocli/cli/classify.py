"""`dino classify`: class and confidence of photos."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dinocli.cli import console
from dinocli.cli.layout import METHOD, OUTPUT
from dinocli.cli.learned import CLASSIFIER
from dinocli.cli.options import Device, Json, NetworkName, NetworkOptions, Photos, Settings, Workers, output_place

if TYPE_CHECKING:
    from dinocli.apps.classify.classifier import Classifier


def classify(
    images: Photos,
    saved: Annotated[
        Path,
        typer.Option(
            "--with",
            metavar="FILE",
            help="Classifier saved by `dino finetune`, or by `dino linear` or `dino knn` with --save.",
            rich_help_panel=METHOD,
        ),
    ] = CLASSIFIER,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            "--checkpoint",
            help="Checkpoint of the classifier, if it moved. Default: the path stored with the classifier.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    network: NetworkName = "teacher",
    overrides: Settings = None,
    workers: Workers = None,
    device: Device = "auto",
    top: Annotated[int, typer.Option(min=1, help="Number of classes to list per image.", rich_help_panel=OUTPUT)] = 1,
    out: Annotated[
        Path, typer.Option(help="Picture of the least certain images of each class.", rich_help_panel=OUTPUT)
    ] = Path("classify.png"),
    csv: Annotated[
        Path | None,
        typer.Option(
            "--csv",
            metavar="FILE",
            help="Also write image, class and confidence to this CSV file.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    sort_into: Annotated[
        Path | None,
        typer.Option(
            "--sort-into",
            metavar="DIR",
            help="Also link each image into a folder of its class, in this new folder. No image is moved or copied.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Classify photos with a saved classifier: print class and confidence, and draw the least certain ones.

    Examples:
        dino classify photo.jpg
        dino classify ./photos --top 3 --csv classes.csv --sort-into sorted
    """
    out = output_place(out, file="classify.png")
    csv = None if csv is None else output_place(csv, "--csv", file="classes.csv")
    sort_into = None if sort_into is None else output_place(sort_into, "--sort-into")

    from dinocli.data.sources.open import photos
    from dinocli.data.sources.outputs import marked
    from dinocli.data.sources.photos import spare

    source = photos(images)
    console.notes(source.notes)
    spare([path for path in (out, csv) if path], (Path(name) for name in source.names))

    from dinocli.apps.classify.classifier import read_classifier  # these import torch
    from dinocli.apps.classify.classify import (
        by_class,
        check_sort_folder,
        check_table_file,
        classify,
        link_by_class,
        write_table,
    )
    from dinocli.apps.classify.sheets import PAGES, draw_classes
    from dinocli.core.device import default_workers, pick_device
    from dinocli.features.encoder import quick
    from dinocli.features.photos import encode
    from dinocli.viz.picture import SHEET_ROWS, sheet_page

    if csv:
        check_table_file(csv)
    if sort_into:
        check_sort_folder(sort_into)
    classifier = read_classifier(saved)
    console.say(_describe(saved, classifier))
    hint = "use --checkpoint with the one it was trained with, or train another: dino extract, then dino linear --save"
    encoder = NetworkOptions(checkpoint, network, overrides, device).maker(classifier.provenance, saved, hint)
    encoder = quick(encoder, classifier.provenance.precision, compiled=False)  # type: ignore[arg-type]
    picked = pick_device(device)
    with console.progress("classify", len(source), "images") as advance:
        encoded = encode(
            encoder,
            source,
            classifier.provenance,
            workers=(default_workers(picked) if len(source) > 64 else 0) if workers is None else workers,
            report=advance,
        )
    console.skipped(encoded.skipped)
    found = classify(classifier, encoded, top)
    groups = by_class(found)
    pages = min(PAGES, -(-len(groups) // SHEET_ROWS))
    with marked(out.parent, "classify", [sheet_page(out, number) for number in range(1, pages + 1)]):
        pictures = draw_classes(groups, out, encoder.images)
    written: list[Any] = [*pictures]
    if csv:
        write_table(csv, found)
        written.append(csv)
    if sort_into:
        with marked(sort_into, "classify"):
            link_by_class(sort_into, found)
        written.append(f"{sort_into}/")
    if json:
        console.out_json(
            {
                "classifier": str(saved),
                "checkpoint": encoder.source,
                "images": [
                    {
                        "image": one.image,
                        "classes": [{"class": label, "confidence": share} for label, share in one.guesses],
                    }
                    for one in found
                ],
                "skipped": encoded.skipped,
                "written": [str(path) for path in written],
            }
        )
    else:
        console.table(
            ["image", "class", "confidence %"],
            [[one.image, guess.label, f"{100 * guess.confidence:.1f}"] for one in found for guess in one.guesses],
        )
    if len(groups) > PAGES * SHEET_ROWS:
        console.say(f"note: the pictures show {PAGES * SHEET_ROWS} of the {len(groups)} classes")
    again = f"dino classify IMAGES --with {quote(str(saved))} --sort-into sorted"
    console.saved(written, "dino plot FEATURES" if sort_into else again)


def _describe(path: Path, classifier: Classifier) -> str:
    calibrated = (
        f"confidence calibrated on {classifier.calibrated_on} images"
        if classifier.calibrated_on
        else "confidence not calibrated"
    )
    scores = {
        "several": f"; mean average precision {classifier.top1:.1f} % on {classifier.test_images} images",
        "one": f"; top-1 {classifier.top1:.1f} % (95 % interval {classifier.interval}) on "
        f"{classifier.test_images} test images",
    }
    score = scores["several" if classifier.several else "one"] if classifier.test_images else ""
    return (
        f"classifier: {path}, {classifier.rule.name}, {len(classifier.classes)} classes from "
        f"{classifier.train_images} images{score}; {calibrated}"
    )
