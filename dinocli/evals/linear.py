"""Linear probe: a linear classifier on frozen features."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinocli.core.errors import DinoError
from dinocli.core.tensors import Values
from dinocli.engine import trainer as engine
from dinocli.engine.schedules import Clock, Cosine
from dinocli.evals.accuracy import Interval, hits_among
from dinocli.evals.balance import shuffle_within, spaced_rows
from dinocli.evals.calibration import CALIBRATED, Calibration, fit_temperature
from dinocli.evals.predictions import Predictions, joined, predict
from dinocli.evals.probes import Probes, scores_of, trainer
from dinocli.evals.units import Floats
from dinocli.features.store import Features

# Learning rates for a batch of 256, from DINOv2's probe. No single rate suits all features, whose scales differ widely.
RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1, 5e-1, 1.0)
_HELD_OUT = 10  # every tenth image of a class is held out to select the learning rate
_TEST = 5  # every fifth image of a class is a test image, if the data has no test split
_HELD_BYTES = 4 * 2**30  # largest features to hold on a GPU, in float32
_FAR = 10  # exponent of two: beyond it, features are rescaled, because the learning rates assume values near 1
_SCORED = 4096  # images classified at once: 213 MB for 13 classifiers of 1000 classes


@dataclass(frozen=True)
class LinearResult:
    """Accuracy of a linear probe.

    Attributes:
        protocol: `stored` for stored features and a swept learning rate, `stored, N views` with N views per image, or
            `paper` for augmented images.
        top1: Percent of test images whose class ranks first.
        macro: Top-1 accuracy averaged over classes, in percent.
        top5: Percent of test images whose class ranks among the top five.
        lr: Learning rate for a batch of 256.
        sweep: Top-1 on the held-out images by learning rate; empty without a sweep.
        train_images: Number of training images, including the held-out ones.
        held_out: Number of training images held out to select the learning rate and to fit the temperature.
        split_off: True if the test images were split off from the training images.
        epochs: Epochs over the training images.
        calibration: Temperature of the confidences. None without held-out images.
    """

    protocol: str
    top1: float
    interval: Interval
    macro: float
    top5: float
    lr: float
    sweep: dict[float, float]
    train_images: int
    held_out: int
    test_images: int
    split_off: bool
    classes: int
    epochs: int
    calibration: Calibration | None


@dataclass(frozen=True, eq=False)
class Probe:
    """Trained linear classifier.

    Attributes:
        weight: Weights, for features as they are stored. [K, D]
        bias: Biases. [K]
        predictions: Predictions for the test images.
        result: Accuracy on the test images.
    """

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    predictions: Predictions
    result: LinearResult


def train_probe(
    train: Features,
    test: Features | None,
    *,
    epochs: int = 100,
    batch_size: int = 256,
    rates: Sequence[float] = RATES,
    seed: int = 0,
    device: torch.device,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Probe:
    """Train a probe on stored features: sweep all learning rates, select one on held-out images, then train on all.

    If views of the training images are stored, each epoch draws one view per image. Held-out and test images use
    centered crops. Training features are read again for each step. A GPU holds them in float32 if they take at most
    4 GiB: 4 S K D bytes with K views, 4 S D without.

    The temperature of the confidences is fitted on the held-out images, before the last training sees them.

    Args:
        train: Labelled training features.
        test: Labelled test features. If None, a fifth of each class of `train`.
        epochs: Epochs over the training images.
        batch_size: Features per step.
        rates: Learning rates to try, for a batch of 256.
        seed: Seed of the initial weights, the order, and the held-out images.
        device: Training device; a GPU also holds features of up to 4 GiB.
        report: Callback after each step, with the steps done and their total.

    Raises:
        DinoError: If there are too few images or classes, or the probe diverges.
    """
    classes = len(train.classes)
    rows = np.arange(len(train))
    if test is None:
        rows, test_rows = _split_off(rows, train.labels, _TEST, seed)
        tested = train
    else:
        test_rows, tested = np.arange(len(test)), test
    fit_rows, held_rows = _split_off(rows, train.labels[rows], _HELD_OUT, seed + 1)
    if classes < 2:
        names = train.classes[0] if classes else "none"
        raise DinoError(
            f"a linear probe needs at least two classes; the features have only {names}",
            "put each class in a folder of its own (data/cat/1.jpg, data/dog/2.jpg) and extract again",
        )
    if not len(held_rows) or not len(test_rows):
        largest = int(np.bincount(train.labels[train.labels >= 0], minlength=1).max())
        needed = _HELD_OUT if test is not None else next(n for n in range(100) if n - n // _TEST >= _HELD_OUT)
        raise DinoError(
            f"a linear probe needs at least {needed} training images in a class; the largest class has {largest}",
            "extract a larger labelled set, or use dino knn",
        )
    views = train.provenance.views if train.views is not None else 0
    scale = _choose_scale(train.values)
    x = _Stored(train.values if train.views is None else train.views, device, scale)
    fits_done = 0

    def fit(rows: NDArray[np.int64], rates: Sequence[float]) -> Probes:
        nonlocal fits_done
        probes = Probes(train.values.shape[1], classes, rates, seed).to(device)
        size = min(batch_size, len(rows))
        clock = Clock(len(rows) // size, epochs)

        def report_step(clock: Clock, values: engine.Values) -> None:
            report(fits_done * clock.total + clock.step, 2 * clock.total)

        schedule = Cosine(kind="cosine", start=1.0, end=0.0)
        trainer(probes, schedule, clock, size).fit(
            _draw_batches(x, train.labels, rows, size, seed, views), clock.total, report_step
        )
        fits_done += 1
        return probes

    probes = fit(fit_rows, rates)
    held_top1 = _measure_accuracy(probes, train, held_rows, device, scale)
    best = int(np.argmax(held_top1))
    final = fit(rows, rates[best : best + 1])
    refuse_diverged(final, "use features without outliers, or fewer --epochs")
    calibrated = held_rows[spaced_rows(len(held_rows), CALIBRATED)]
    held_logits = np.concatenate([scores[best] for _, scores in _score(probes, train, calibrated, device, scale)])
    temperature = fit_temperature(held_logits, train.labels[calibrated])
    predictions = joined(
        [
            predict([tested.paths[row] for row in block.tolist()], tested.labels[block], scores, temperature)
            for block, [scores] in _score(final, tested, test_rows, device, scale)
        ]
    )
    result = LinearResult(
        protocol=f"stored, {views} views" if views else "stored",
        top1=predictions.percent(1),
        interval=predictions.interval,
        macro=predictions.macro,
        top5=predictions.percent(5),
        lr=rates[best],
        sweep=dict(zip(rates, held_top1, strict=True)),
        train_images=len(rows),
        held_out=len(held_rows),
        test_images=len(test_rows),
        split_off=test is None,
        classes=classes,
        epochs=epochs,
        calibration=Calibration(temperature, len(calibrated), "held-out training images", *predictions.errors),
    )
    # Scaling by a power of two changes no digit of the weights.
    return Probe(*folded(final, scale), predictions, result)


def folded(probes: Probes, scale: float = 1.0) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return weight and bias of the only classifier, for features that were multiplied by `scale` in training."""
    [weight], [bias] = probes.weights, probes.biases
    return (weight.detach().cpu() * scale).numpy(), bias.detach().cpu().numpy()


class _Stored:
    """Features for training steps, in float32: read from storage for each step, or held on a GPU if they fit in 4 GiB.

    On a CPU, a copy in memory would save less than a tenth of a step.
    """

    def __init__(self, values: Values, device: torch.device, scale: float = 1.0) -> None:
        self.values, self.device, self.scale = values, device, scale
        self.held: Tensor | None = None
        if device.type != "cpu" and 4 * math.prod(values.shape) <= _HELD_BYTES:
            self.held = _hold(values, device, scale)

    def __getitem__(self, index: tuple[NDArray[np.int64], ...]) -> Tensor:
        """Return features by row, or by row and view. [B, D]"""
        if self.held is not None:
            return self.held[tuple(torch.from_numpy(part).to(self.device) for part in index)]
        return _to_tensor(self.values[index], self.scale).to(self.device)


def _hold(values: Values, device: torch.device, scale: float) -> Tensor:
    """Copy features to a device, block by block: the host needs no memory for all of them."""
    held = torch.empty(values.shape, device=device)
    for first in range(0, len(values), _SCORED):
        block = slice(first, first + _SCORED)
        held[block] = _to_tensor(values[block], scale).to(device)
    return held


def _to_tensor(values: Floats, scale: float) -> Tensor:
    tensor = torch.from_numpy(np.require(values, requirements=["C", "W"]))
    return tensor if scale == 1 else tensor * scale


def _choose_scale(values: Values) -> float:
    """Return a power of two that scales features to values near 1, as after a final norm; 1 if they need no scaling."""
    sample = values[np.unique(np.linspace(0, len(values) - 1, _SCORED).astype(np.int64))]
    rms = float(np.median(np.sqrt(np.square(sample, dtype=np.float64).mean(1))))
    power = round(math.log2(rms)) if rms else 0
    return 2.0 ** min(126, -power) if abs(power) > _FAR else 1.0


def refuse_diverged(probes: Probes, hint: str) -> None:
    """Check that the probes' weights are finite.

    Raises:
        DinoError: If training diverged, with the given hint.
    """
    if not all(bool(p.isfinite().all()) for p in probes.parameters()):
        raise DinoError("the linear probe diverged: its weights are not finite", hint)


def _draw_batches(
    x: _Stored, y: NDArray[np.int64], rows: NDArray[np.int64], size: int, seed: int, views: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield endless batches of features and labels: each row once per epoch, with one random view."""
    generator, labels = np.random.default_rng(seed), torch.from_numpy(y).to(x.device)
    while True:
        order = generator.permutation(rows)
        view = (generator.integers(views, size=len(order)),) if views else ()
        for start in range(0, len(order) - size + 1, size):
            batch = slice(start, start + size)
            yield x[(order[batch], *(d[batch] for d in view))], labels[torch.from_numpy(order[batch]).to(x.device)]


def _split_off(
    rows: NDArray[np.int64], labels: NDArray[np.int64], every: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split off every `every`-th image of each class; return the remaining rows and the rows split off."""
    is_split_off = shuffle_within(labels, seed) % every == every - 1
    return rows[~is_split_off], rows[is_split_off]


def _score(
    probes: Probes, features: Features, rows: NDArray[np.int64], device: torch.device, scale: float
) -> Iterator[tuple[NDArray[np.int64], list[NDArray[np.float32]]]]:
    """Yield blocks of rows with the scores of each classifier. [B], [rates] times [B, classes]"""
    for start in range(0, len(rows), _SCORED):
        block = rows[start : start + _SCORED]
        yield block, scores_of(probes, _to_tensor(features.values[block], scale).to(device))


def _measure_accuracy(
    probes: Probes, features: Features, rows: NDArray[np.int64], device: torch.device, scale: float
) -> list[float]:
    """Return the top-1 accuracy of each classifier on the given rows, in percent. [rates]"""
    hits = np.zeros(len(probes.rates))
    for block, scores in _score(probes, features, rows, device, scale):
        hits += [hits_among(each, features.labels[block])[0] for each in scores]
    return (100 * hits / len(rows)).tolist()
