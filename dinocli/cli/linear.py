"""`dino linear`: linear probe on frozen features."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

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
from dinocli.cli.options import (
    Checkpoint,
    Device,
    FeatureFolder,
    Json,
    Settings,
    Size,
    Tokens,
    Workers,
    encoder_from,
    features_or_newest,
)
from dinocli.cli.places import images_place
from dinocli.core.errors import DinoError

if TYPE_CHECKING:
    from dinocli.evals.folds import FoldsResult
    from dinocli.evals.linear import LinearResult, Probe
    from dinocli.evals.predictions import Predictions
    from dinocli.features.encoder import TokenChoice
    from dinocli.features.store import Provenance

_SCORES = ("top-1 %", "95 % interval", "macro %", "top-5 %")


def linear(
    features: FeatureFolder = None,
    epochs: Annotated[int, typer.Option(min=1, help="Training epochs.", rich_help_panel=METHOD)] = 100,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Images per step. Default: 256, or 1024 with --paper.", rich_help_panel=METHOD),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            min=0, help="Seed of the initial weights, the image order and the held-out split.", rich_help_panel=METHOD
        ),
    ] = 0,
    folds: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Cross-validate instead: train N probes, each tested on another N-th of every class. For small sets; "
            "uses the training split alone.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    paper: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            callback=images_place,
            help="Run the paper's protocol instead: SGD on augmented images of this folder (train/ and val/ with class "
            "folders). Reads no features.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    checkpoint: Checkpoint = None,
    lr: Annotated[
        float, typer.Option(min=0, help="With --paper: learning rate for a batch size of 256.", rich_help_panel=METHOD)
    ] = 0.001,
    blocks: Annotated[
        int,
        typer.Option(min=1, help="With --paper: concatenate the tokens of the last N blocks.", rich_help_panel=METHOD),
    ] = 4,
    tokens: Tokens = "cls",
    size: Size = None,
    overrides: Settings = None,
    workers: Workers = None,
    device: Device = "auto",
    predictions: PredictionsFile = None,
    save: Save = False,
    out: ClassifierFile = CLASSIFIER,
    json: Json = False,
) -> None:
    """Train a linear probe: on stored features with a learning-rate sweep, or by the paper's protocol (--paper).

    Examples:
        dino linear --features features --save
        dino linear --folds 5 --predictions predictions.csv
        dino linear --paper ./data --checkpoint ckpt.safetensors --blocks 4
    """
    if not paper and (checkpoint or size or overrides or (lr, blocks, tokens) != (0.001, 4, "cls")):
        raise DinoError(
            "--checkpoint, --lr, --blocks, --tokens, --size and --set need images (--paper)",
            "use --paper DATA; for stored features, set them in `dino extract`",
        )
    if folds and paper:
        raise DinoError("--folds needs stored features; --paper trains on images", "omit --folds, or --paper")
    if folds and save:
        raise DinoError("--folds trains several probes; --save needs a single one", "omit --folds, or --save")
    out = classifier_place(out, save=save)
    predictions = predictions_place(predictions)
    if paper:
        trained = _train_on_images(
            paper, checkpoint, tokens, blocks, size, overrides, lr, epochs, batch_size or 1024, seed, workers, device
        )
    else:
        trained = _train_on_features(features, folds, epochs, batch_size or 256, seed, device)
    result: Any = trained.probe.result if trained.probe else trained.folds
    kept: dict[str, Any] = {}
    written: list[object] = []
    if save and trained.probe:
        _save(out, trained.probe, trained.classes, trained.provenance)
        kept["classifier"] = str(out)
        written.append(out)
    if predictions:
        kept |= save_predictions(predictions, trained.predictions, trained.classes, "linear")
        written += [kept["predictions"], kept["confusion"]]
    if json:
        console.out_json(asdict(result) | kept)
    else:
        if trained.folds:
            _print_folds(trained.folds, trained.provenance.maker)
        elif trained.probe:
            _print_probe(trained.probe.result, trained.provenance.maker)
        if predictions:
            print_class_accuracies(kept["per_class"])
    if trained.probe:
        print_calibration(trained.probe.result.calibration)
    console.saved(written, _following(out if save else None, features, paper))


class _Trained(NamedTuple):
    """Probe, or the scores of several probes, one per fold."""

    probe: Probe | None
    folds: FoldsResult | None
    predictions: Predictions
    classes: list[str]
    provenance: Provenance


def _save(path: Path, probe: Probe, classes: list[str], provenance: Provenance) -> None:
    from dinocli.apps.classify.classifier import Classifier, LinearRule, write_classifier

    result, calibration = probe.result, probe.result.calibration
    classifier = Classifier(
        LinearRule(probe.weight, probe.bias),
        classes,
        provenance,
        calibration.temperature if calibration else 1.0,
        calibration.images if calibration else 0,
        result.top1,
        result.interval,
        result.train_images,
        result.test_images,
    )
    write_classifier(path, classifier)


def _following(saved: Path | None, features: Path | None, paper: str | None) -> str:
    """Return the command to run next: classify with a saved probe, else save one."""
    if saved:
        return f"dino classify IMAGES --with {quote(str(saved))}"
    given = f"--paper {quote(paper)} " if paper else f"--features {quote(str(features))} " if features else ""
    return f"dino linear {given}--save"


def _train_on_features(
    features: Path | None, folds: int | None, epochs: int, batch_size: int, seed: int, device: str
) -> _Trained:
    """Train on stored features, once or once per fold."""
    folder = features_or_newest(features)

    from dinocli.features.store import compared, read_splits, unlabelled

    stored = read_splits(folder)
    console.notes(unlabelled(stored))
    train, held = compared(stored)

    from dinocli.core.device import pick_device  # these import torch
    from dinocli.evals.balance import describe_imbalance
    from dinocli.evals.folds import cross_validate
    from dinocli.evals.linear import train_probe

    console.notes(filter(None, [describe_imbalance(train.labels, train.classes)]))
    if folds and held is not None:
        console.say(f"note: --folds uses the training split alone, not the {len(held)} images of the test split")
    picked = pick_device(device)
    with console.progress("linear", 100, "%") as advance:

        def report(done: int, total: int) -> None:
            advance(100 * done // total, f"step {done}/{total}")

        options: Any = {"epochs": epochs, "batch_size": batch_size, "seed": seed, "device": picked, "report": report}
        if folds:
            return _Trained(None, *cross_validate(train, folds, **options), train.classes, train.provenance)
        probe = train_probe(train, held, **options)
    return _Trained(probe, None, probe.predictions, train.classes, train.provenance)


def _train_on_images(
    data: str,
    checkpoint: str | None,
    tokens: TokenChoice,
    blocks: int,
    size: int | None,
    overrides: list[str] | None,
    lr: float,
    epochs: int,
    batch_size: int,
    seed: int,
    workers: int | None,
    device: str,
) -> _Trained:
    """Train by the paper's protocol."""
    from dinocli.data.sources.indexed import Images
    from dinocli.data.sources.open import splits, within

    parts = {name: part for name, part in splits(data).items() if isinstance(part, Images)}
    test = parts.get("val") or parts.get("test")
    if "train" not in parts or test is None:
        raise DinoError(
            f"{data} has {', '.join(parts) or 'no split'}; expected train/ and val/ with class folders",
            "arrange the images as DATA/train/CLASS/* and DATA/val/CLASS/*",
        )

    from dinocli.core.device import default_workers, pick_device  # these import torch
    from dinocli.evals.linear_paper import linear_on_images
    from dinocli.features.encoder import whole_patches
    from dinocli.features.store import Provenance

    picked = pick_device(device)
    encoder = encoder_from(checkpoint, device, "teacher", overrides)
    train, test = within(parts["train"], encoder.images), within(test, encoder.images)
    size = whole_patches(encoder, size) or encoder.size
    with console.progress("linear", 100, "%") as advance:
        probe = linear_on_images(
            encoder,
            train,
            test,
            tokens=tokens,
            blocks=blocks,
            size=size,
            epochs=epochs,
            lr=lr,
            batch_size=batch_size,
            workers=default_workers(picked) if workers is None else workers,
            seed=seed,
            report=lambda done, total: advance(100 * done // total, f"step {done}/{total}"),
        )
    provenance = Provenance(encoder.source, encoder.fingerprint, tokens, blocks, size, data)
    provenance = replace(provenance, run=encoder.run, step=encoder.step)
    return _Trained(probe, None, probe.predictions, train.classes, provenance)


def _print_probe(result: LinearResult, source: str) -> None:
    if result.sweep:
        console.say(
            f"learning rate {result.lr:g}: the best of {len(result.sweep)} on {result.held_out} images held out of the "
            f"training split; then trained on all {result.train_images}"
        )
    if result.split_off:
        console.say(f"note: the data has one split; held out {result.test_images} images as the test split")
    console.table(
        ["protocol", "learning rate", *_SCORES],
        [
            [
                result.protocol,
                f"{result.lr:g}",
                f"{result.top1:.2f}",
                str(result.interval),
                f"{result.macro:.2f}",
                f"{result.top5:.2f}",
            ]
        ],
        title=f"linear probe of {source}: {result.train_images} training and {result.test_images} test images of "
        f"{result.classes} classes",
    )


def _print_folds(result: FoldsResult, source: str) -> None:
    rows = [
        [str(number), f"{fold.lr:g}", f"{fold.top1:.2f}", str(fold.interval), f"{fold.macro:.2f}", f"{fold.top5:.2f}"]
        for number, fold in enumerate(result.folds, 1)
    ]
    mean = f"{result.top1:.2f}", str(result.interval), f"{result.macro:.2f}", f"{result.top5:.2f}"
    console.table(
        ["fold", "learning rate", *_SCORES],
        [*rows, ["all", "", *mean]],
        title=f"linear probe of {source}: {result.images} images of {result.classes} classes, in {len(rows)} folds",
    )
    console.say(
        f"top-1 {result.top1:.2f} % on average, with a standard deviation of {result.spread:.2f} points between folds"
    )
