"""`dino knn`: k-nearest-neighbour classification of stored features."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from dinocli.cli import console
from dinocli.cli.layout import METHOD
from dinocli.cli.options import FeatureFolder, Json, Temperature, features_or_newest
from dinocli.core.errors import DinoError


def knn(
    features: FeatureFolder = None,
    k: Annotated[
        list[int] | None,
        typer.Option(
            "--k",
            help="Number of nearest neighbours that vote; may be repeated. Default: 10 and 20, or all if fewer.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    temperature: Temperature = 0.07,
    json: Json = False,
) -> None:
    """Evaluate features by weighted k-NN classification with cosine similarity, as in the DINO paper.

    Examples:
        dino knn
        dino knn --features features --k 10 --k 20
    """
    folder = features_or_newest(features)

    from dinocli.features.store import compared, read_splits, unlabelled

    splits = read_splits(folder)
    console.notes(unlabelled(splits))
    train, test = compared(splits)
    if len(train.classes) == 1:
        raise DinoError(
            f"all {len(train)} images of {train.provenance.data} are of one class, {train.classes[0]}; "
            "expected at least two classes",
            "put each class in a folder of its own (data/cat/1.jpg, data/dog/2.jpg) and extract again",
        )

    from dinocli.evals.knn import knn, votable  # imports torch, so only after the checks above

    most = votable(train, test)
    if test is None and len(splits) == 1 and "all" not in splits:
        name = next(iter(splits))
        console.say(
            f"note: {folder} has only the {name} split; to score test images, extract a folder with train/ and val/"
        )
    result = knn(train, test, k or [n for n in (10, 20) if n <= most] or [most], temperature)
    if json:
        about = {
            "checkpoint": train.provenance.source,
            "run": train.provenance.run or None,
            "step": train.provenance.step,
        }
        console.out_json(asdict(result) | about)
        return
    how = (
        "each image by all others (leave-one-out)"
        if result.leave_one_out
        else f"by {result.neighbours} training images"
    )
    console.table(
        ["k", "top-1 %", "top-5 %"],
        [[str(s.k), f"{s.top1:.2f}", f"{s.top5:.2f}"] for s in result.scores],
        title=f"k-NN of {train.provenance.maker}: {result.queries} images of {result.classes} classes, {how}",
    )
