"""Cross-validation of a linear probe: every image is a test image once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from dinocli.core.errors import DinoError
from dinocli.evals.accuracy import Interval
from dinocli.evals.balance import shuffle_within
from dinocli.evals.linear import LinearResult, train_probe
from dinocli.evals.predictions import Predictions, joined
from dinocli.features.store import Features, subset


@dataclass(frozen=True)
class FoldsResult:
    """Accuracy over all folds.

    Attributes:
        top1: Mean over folds of the top-1 accuracy, in percent.
        spread: Standard deviation over folds of the top-1 accuracy, in percentage points.
        interval: 95 % interval of the top-1 accuracy over all images together.
        macro: Top-1 accuracy of all images together, averaged over classes, in percent.
        top5: Mean over folds of the top-5 accuracy, in percent.
        images: Number of images; each is a test image once.
        folds: Result of each fold.
    """

    top1: float
    spread: float
    interval: Interval
    macro: float
    top5: float
    images: int
    classes: int
    folds: list[LinearResult]


def cross_validate(
    features: Features,
    folds: int,
    *,
    epochs: int = 100,
    batch_size: int = 256,
    seed: int = 0,
    device: torch.device,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[FoldsResult, Predictions]:
    """Train one probe per fold on the other folds, with its own learning rate, and predict the fold's images.

    Each fold holds an equal share of every class, of randomly chosen images.

    Args:
        features: Labelled features.
        folds: Number of folds, at least two.
        epochs: Number of epochs per fold.
        batch_size: Features per step.
        seed: Seed of the folds, and of each probe as in `train_probe`.
        device: Training device; a GPU also holds features of up to 4 GiB.
        report: Callback after each step of a fold, with the steps done in all folds and their total.

    Raises:
        DinoError: If a class has fewer images than there are folds, or `train_probe` fails.
    """
    sizes = np.bincount(features.labels, minlength=len(features.classes))
    used = np.flatnonzero(sizes)
    smallest = used[sizes[used].argmin()]
    if sizes[smallest] < folds:
        few = int(sizes[smallest])
        images = f"the {few} images" if few > 1 else "the only image"
        raise DinoError(
            f"--folds {folds} is larger than {images} of the smallest class, {features.classes[smallest]}",
            f"use --folds {few} or fewer" if few > 1 else "add images of that class, or remove it, and extract again",
        )
    fold_of = shuffle_within(features.labels, seed) % folds
    probes = []
    for fold in range(folds):

        def report_step(done: int, total: int, fold: int = fold) -> None:
            report(fold * total + done, folds * total)

        train, test = (subset(features, np.flatnonzero(part)) for part in (fold_of != fold, fold_of == fold))
        probes.append(
            train_probe(train, test, epochs=epochs, batch_size=batch_size, seed=seed, device=device, report=report_step)
        )
    predictions, results = joined([p.predictions for p in probes]), [p.result for p in probes]
    top1 = np.array([r.top1 for r in results])
    result = FoldsResult(
        float(top1.mean()),
        float(top1.std(ddof=1)),
        predictions.interval,
        predictions.macro,
        float(np.mean([r.top5 for r in results])),
        len(features),
        len(features.classes),
        results,
    )
    return result, predictions
