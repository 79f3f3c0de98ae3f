"""`dino knn`: k-nearest-neighbour classification of stored features."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dinocli.cli import console
from dinocli.cli.layout import METHOD
from dinocli.cli.learned import (
    CLASSIFIER,
    ClassifierFile,
    PredictionsFile,
    Save,
    classifier_place,
    predictions_place,
    print_calibration,
    print_class_accuracies,
    save_predictions,
)
from dinocli.cli.options import FeatureFolder, Json, Temperature, features_or_newest
from dinocli.core.errors import DinoError

if TYPE_CHECKING:
    from dinocli.evals.knn import KnnResult


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
    predictions: PredictionsFile = None,
    save: Save = False,
    out: ClassifierFile = CLASSIFIER,
    json: Json = False,
) -> None:
    """Evaluate features by weighted k-NN classification with cosine similarity, as in the DINO paper.

    Examples:
        dino knn
        dino knn --features features --k 10 --k 20
        dino knn --save --predictions predictions.csv
    """
    out = classifier_place(out, save=save)
    predictions = predictions_place(predictions)
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

    from dinocli.evals.balance import describe_imbalance
    from dinocli.evals.knn import knn, predict_by_votes, votable  # imports torch, so only after the checks above

    most = votable(train, test)
    if test is None and len(splits) == 1 and "all" not in splits:
        name = next(iter(splits))
        console.say(
            f"note: {folder} has only the {name} split; to score test images, extract a folder with train/ and val/"
        )
    console.notes(filter(None, [describe_imbalance(train.labels, train.classes)]))
    ks = k or [n for n in (10, 20) if n <= most] or [most]
    result = knn(train, test, ks, temperature)
    about = {"checkpoint": train.provenance.source, "run": train.provenance.run or None, "step": train.provenance.step}
    kept: dict[str, Any] = {}
    written: list[object] = []
    if predictions or save:
        chosen, calibration, found = predict_by_votes(train, test, ks, temperature)
        kept = {"chosen_k": chosen, "calibration": asdict(calibration)}
        if save:
            from dinocli.apps.classify.classifier import Classifier, VoteRule, write_classifier

            classifier = Classifier(
                VoteRule(train, chosen, temperature),
                train.classes,
                train.provenance,
                calibration.temperature,
                calibration.images,
                found.percent(1),
                found.interval,
                len(train),
                len(found),
            )
            write_classifier(out, classifier)
            kept["classifier"] = str(out)
            written.append(out)
        if predictions:
            kept |= save_predictions(predictions, found, train.classes, "knn")
            written += [kept["predictions"], kept["confusion"]]
    if json:
        console.out_json(asdict(result) | about | kept)
    else:
        _print(result, train.provenance.maker)
    if predictions and not json:
        print_class_accuracies(kept["per_class"])
    if kept:
        if len(ks) > 1:
            listed = " and ".join(map(str, ks))
            console.say(f"k {chosen}: the best of {listed} in leave-one-out on training images")
        print_calibration(calibration)
    console.saved(written, f"dino classify IMAGES --with {out}" if save else "")


def _print(result: KnnResult, maker: str) -> None:
    how = (
        "each image by all others (leave-one-out)"
        if result.leave_one_out
        else f"by {result.neighbours} training images"
    )
    console.table(
        ["k", "top-1 %", "95 % interval", "macro %", "top-5 %"],
        [[str(s.k), f"{s.top1:.2f}", str(s.interval), f"{s.macro:.2f}", f"{s.top5:.2f}"] for s in result.scores],
        title=f"k-NN of {maker}: {result.queries} images of {result.classes} classes, {how}",
    )
