"""`dino knn`: k-nearest-neighbour classification of stored features."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any, Literal

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
from dinocli.cli.options import Device, FeatureFolder, Json, Temperature, features_or_newest
from dinocli.core.errors import DinoError

if TYPE_CHECKING:
    from dinocli.apps.search.index import Index
    from dinocli.evals.knn import KnnResult, Search
    from dinocli.features.store import Features


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
    index: Annotated[
        Literal["exact", "ivf"],
        typer.Option(
            "--index",
            help="exact compares each image with all training images; ivf with those of near groups, for millions of "
            "images: its recall is measured and printed.",
            rich_help_panel=METHOD,
        ),
    ] = "exact",
    device: Device = "auto",
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
        dino knn --index ivf
    """
    if index == "ivf" and device not in ("auto", "cpu"):
        raise DinoError(f"--index ivf searches on the CPU, not on --device {device}", "omit --index ivf, or --device")
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
    found_index = _index(train, folder) if index == "ivf" else None
    find = found_index.search if found_index else _search_on(device, train)
    result = knn(train, test, ks, temperature, find)
    about: dict[str, Any] = {
        "checkpoint": train.provenance.source,
        "run": train.provenance.run or None,
        "step": train.provenance.step,
    }
    if found_index:
        recall = found_index.about.recall
        about["recall"] = recall
        console.say(f"ivf index: found {recall:.1%} of the ten nearest in a sample of training images")
    kept: dict[str, Any] = {}
    written: list[object] = []
    if predictions or save:
        chosen, calibration, found = predict_by_votes(train, test, ks, temperature, find)
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
    following = (
        f"dino classify IMAGES --with {quote(str(out))}" if save else f"dino linear --features {quote(str(folder))}"
    )
    console.saved(written, following)


def _index(train: Features, folder: Path) -> Index:
    from dinocli.apps.search.index import digest_of, open_index

    with console.progress("ivf index", len(train), "images") as advance:
        return open_index(train.values, "ivf", folder / "knn", digest_of(train.values), advance)


def _search_on(device: str, train: Features) -> Search | None:
    """Return the search on a device, or None for that of the CPU; `auto` is CUDA if available, else the CPU."""
    from dinocli.core.device import pick_device
    from dinocli.evals.device_search import DeviceSearch

    picked = pick_device(device)
    if picked.type == "cpu" or (device == "auto" and picked.type != "cuda"):
        return None
    return DeviceSearch(train.values, picked).search


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
