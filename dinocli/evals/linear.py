"""Linear probe: a linear classifier on frozen features."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinocli.data.crops import ViewConfig, ViewsConfig
from dinocli.data.loader import TrainBatches
from dinocli.data.sources import Images
from dinocli.encoder import Encoder, TokenChoice, finite_rows
from dinocli.engine import trainer as engine
from dinocli.errors import DinoError
from dinocli.evals.accuracy import hits_among
from dinocli.evals.probes import Probes, scores_of, trainer
from dinocli.evals.units import Floats
from dinocli.features import Features
from dinocli.mapped import Values
from dinocli.schedules import Clock, Cosine, CosineByEpoch

# Thirteen rates for a batch of 256, as DINOv2's probe sweeps; features differ in scale by more than any one rate spans.
RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1, 5e-1, 1.0)
_HELD_OUT = 10  # every tenth image of a class chooses the rate
_TEST = 5  # every fifth image of a class is the test, where the data has no test of its own
_HELD_BYTES = 4 * 2**30
_FAR = 10  # as a power of two: features so much larger or smaller than 1 are scaled, since rates are for others
_SCORED = 4096  # images that are classified at once: by 13 classifiers of 1000 classes, 213 MB


@dataclass(frozen=True)
class LinearResult:
    """Accuracy of a linear probe.

    Attributes:
        protocol: `stored` features with a swept rate, the same with so many `views` of each image, or the `paper`'s
            augmented images.
        top1: Percent of test images whose class is first.
        top5: Percent of test images whose class is among the first five.
        lr: The rate, for a batch of 256.
        sweep: Each rate and its top-1 on the held-out images; none where no rate was chosen.
        train_images: Images the probe learned from, the held-out ones counted.
        held_out: Of these, the images that chose the rate.
        test_images: Images it was measured on.
        split_off: Whether the test images were taken from the only split there was.
        classes: How many there are.
        epochs: Passes over the training images.
    """

    protocol: str
    top1: float
    top5: float
    lr: float
    sweep: dict[float, float]
    train_images: int
    held_out: int
    test_images: int
    split_off: bool
    classes: int
    epochs: int


def linear(
    train: Features,
    test: Features | None,
    *,
    epochs: int = 100,
    batch_size: int = 256,
    rates: Sequence[float] = RATES,
    seed: int = 0,
    device: torch.device,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> LinearResult:
    """Train a probe on stored features: all rates at once, one chosen on held-out training images, then on all of them.

    Where views of the training images are stored, an epoch takes one of each image, drawn anew; the held-out and the
    test images are the centered ones. What is learned from is held as float32 if that takes at most 4 GiB (4 S K D
    bytes with K views, 4 S D without), and else read again for each step.

    Args:
        train: Labelled features to learn from.
        test: Labelled features to measure on; absent, a fifth of each class of `train`.
        epochs: Passes over the training features.
        batch_size: Features a step.
        rates: Learning rates to try, for a batch of 256.
        seed: Of the start, the order, and which images are held out.
        device: Where to train.
        report: Called after each step with steps done and steps in all.

    Raises:
        DinoError: There are too few images or classes, or the probe diverges.
    """
    classes = len(train.classes)
    rows = np.arange(len(train))
    if test is None:
        rows, test_rows = _set_apart(rows, train.labels, _TEST, seed)
        test_values, test_labels = train.values, train.labels[test_rows]
    else:
        test_values, test_rows, test_labels = test.values, np.arange(len(test)), test.labels
    kept, held = _set_apart(rows, train.labels[rows], _HELD_OUT, seed + 1)
    if classes < 2:
        names = train.classes[0] if classes else "none"
        raise DinoError(
            f"a linear probe needs two classes; the features have {names} alone",
            "put each class in a folder of its own (data/cat/1.jpg, data/dog/2.jpg) and extract again",
        )
    if not len(held) or not len(test_labels):
        largest = int(np.bincount(train.labels[train.labels >= 0], minlength=1).max())
        needed = _HELD_OUT if test is not None else next(n for n in range(100) if n - n // _TEST >= _HELD_OUT)
        raise DinoError(
            f"a linear probe needs {needed} training images of a class; the largest class has {largest}",
            "extract a larger labelled set, or dino knn, which takes any",
        )
    views = train.recipe.views if train.views is not None else 0
    scale = _scale_of(train.values)
    x = _Stored(train.values if train.views is None else train.views, device, scale)
    fitted = 0

    def fit(on: NDArray[np.int64], rates: Sequence[float]) -> Probes:
        nonlocal fitted
        probes = Probes(train.values.shape[1], classes, rates, seed).to(device)
        size = min(batch_size, len(on))
        clock = Clock(len(on) // size, epochs)

        def count(clock: Clock, values: engine.Values) -> bool:
            report(fitted * clock.total + clock.step, 2 * clock.total)
            return False

        schedule = Cosine(kind="cosine", start=1.0, end=0.0)
        trainer(probes, schedule, clock, size).fit(_batches(x, train.labels, on, size, seed, views), clock.total, count)
        fitted += 1
        return probes

    probes = fit(kept, rates)
    held_top1 = [top1 for top1, _ in _percents(probes, train.values, held, train.labels[held], device, scale)]
    best = int(np.argmax(held_top1))
    chosen = fit(rows, rates[best : best + 1])
    _refuse_diverged(chosen, "features without outliers, or fewer --epochs")
    [[top1, top5]] = _percents(chosen, test_values, test_rows, test_labels, device, scale)
    return LinearResult(
        f"stored, {views} views" if views else "stored",
        top1,
        top5,
        rates[best],
        dict(zip(rates, held_top1, strict=True)),
        len(rows),
        len(held),
        len(test_labels),
        test is None,
        classes,
        epochs,
    )


def linear_on_images(
    encoder: Encoder,
    train: Images,
    test: Images,
    *,
    tokens: TokenChoice = "cls",
    blocks: int = 4,
    size: int | None = None,
    epochs: int = 100,
    lr: float = 0.001,
    batch_size: int = 1024,
    workers: int = 0,
    seed: int = 0,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> LinearResult:
    """The paper's protocol: SGD on randomly cropped and flipped images, a new pass of the backbone each epoch.

    Args:
        encoder: The frozen backbone.
        train: Labelled images to learn from.
        test: Labelled images to measure on, with the same classes.
        tokens: Which tokens; the paper's are `cls` for ViT-S and `cls+avg` for ViT-B.
        blocks: Of how many of the last blocks; the paper's are 4 for ViT-S and 1 for ViT-B.
        size: Side of the images in pixels; absent, what the encoder was trained on.
        epochs: Passes over the training images.
        lr: For a batch of 256; it falls along a cosine, an epoch at a time.
        batch_size: Images a step.
        workers: Processes that decode.
        seed: Of the start, the order and the crops.
        report: Called after each step with steps done and steps in all.

    Raises:
        DinoError: There are fewer images than one batch, no labels, or other classes in the test; a test image's
            features are not finite, or the probe diverges.

    Source: facebookresearch/dino@7c446df eval_linear.py. Reported is the last epoch, where the original takes the best
    one on the test images.
    """
    if tokens == "patches":
        raise DinoError(
            "a classifier wants one feature an image; --tokens patches gives many", "--tokens cls or cls+avg"
        )
    if not train.classes or train.classes != test.classes:
        raise DinoError(
            "class folders with the same names in both splits were wanted", "DATA/train/CLASS/* and DATA/val/CLASS/*"
        )
    if len(train) < batch_size:
        raise DinoError(
            f"a batch of {batch_size} images was wanted; there are {len(train)}", f"--batch-size {len(train)}"
        )
    size = size or encoder.size
    labels = torch.from_numpy(train.labels).long()
    sample = encoder.features(torch.zeros(1, encoder.channels, size, size, device=encoder.device), tokens, blocks)
    probes = Probes(sample.shape[1], len(train.classes), [lr], seed).to(encoder.device)
    clock = Clock(len(train) // batch_size, epochs)

    views_of_train = TrainBatches(
        train,
        augmented(encoder, size),
        batch_size=batch_size,
        seed=seed,
        images=encoder.images,
        workers=workers,
        device=encoder.device,
    )

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in views_of_train:
            yield encoder.features(batch.global_crops[0], tokens, blocks), labels[batch.rows].to(encoder.device)

    def count(clock: Clock, values: engine.Values) -> bool:
        report(clock.step, clock.total)
        return False

    schedule = CosineByEpoch(kind="cosine_by_epoch", start=1.0, end=0.0)
    try:
        trainer(probes, schedule, clock, batch_size).fit(batches(), clock.total, count)
    finally:
        views_of_train.close()
    _refuse_diverged(probes, "a lower --lr, or another checkpoint")
    hits, images = np.zeros(2), 0
    for plain in encoder.batches(test, size=size, batch_size=batch_size, workers=workers):
        if plain.names:
            truth, made = np.array(plain.labels), encoder.features(plain.images, tokens, blocks)
            for name, reason in finite_rows(made, plain.names)[1]:
                raise DinoError(f"{name}: {reason}", "leave it out; of all images, another checkpoint")
            hits += hits_among(scores_of(probes, made)[0], truth)
            images += len(truth)
    if not images:
        raise DinoError(f"none of the {len(test)} test images in {test.where} can be read", "look at them")
    top1, top5 = (100 * hits / images).tolist()
    return LinearResult("paper", top1, top5, lr, {}, len(train), 0, images, False, len(train.classes), epochs)


def augmented(encoder: Encoder, size: int, views: int = 1) -> ViewsConfig:
    """The views that a linear probe learns from: crops of any size with flips.

    Args:
        encoder: Whose images they are to be like.
        size: Of a view, in pixels.
        views: How many of each image, all alike.

    Source: facebookresearch/dino@7c446df eval_linear.py, torchvision's RandomResizedCrop as it is.
    """
    crop = ViewConfig(size=size, scale=(0.08, 1.0), flip=0.5, resample="bilinear")
    more = crop if views > 1 else None
    return ViewsConfig(mean=encoder.mean, std=encoder.std, global_1=crop, local=more, locals=views - 1)


class _Stored:
    """Features that steps ask for: on the device as float32 where that takes at most 4 GiB, else where they lie."""

    def __init__(self, values: Values, device: torch.device, scale: float = 1.0) -> None:
        self.device, self.scale = device, scale
        self.held: Tensor | None = None
        if 4 * math.prod(values.shape) <= _HELD_BYTES:
            self.held = _scaled(values[:], scale).to(device)
        self.values = values

    def __getitem__(self, where: tuple[NDArray[np.int64], ...]) -> Tensor:
        """Of some rows, or of some rows each at a place of its own. [B, D]"""
        if self.held is not None:
            return self.held[tuple(torch.from_numpy(part).to(self.device) for part in where)]
        return _scaled(self.values[where], self.scale).to(self.device)


def _scaled(values: Floats, scale: float) -> Tensor:
    found = torch.from_numpy(np.require(values, requirements=["C", "W"]))
    return found if scale == 1 else found * scale


def _scale_of(values: Values) -> float:
    """Return a power of two that brings numbers near 1, as a last norm leaves them, if they are far from it; else 1."""
    some = values[np.unique(np.linspace(0, len(values) - 1, _SCORED).astype(np.int64))]
    size = float(np.median(np.sqrt(np.square(some, dtype=np.float64).mean(1))))
    power = round(math.log2(size)) if size else 0
    return 2.0 ** min(126, -power) if abs(power) > _FAR else 1.0


def _refuse_diverged(probes: Probes, hint: str) -> None:
    if not all(bool(p.isfinite().all()) for p in probes.parameters()):
        raise DinoError("the linear probe diverged: its weights are not finite", hint)


def _batches(
    x: _Stored, y: NDArray[np.int64], rows: NDArray[np.int64], size: int, seed: int, views: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of features and labels: each row once an epoch, and of its views one that is drawn."""
    generator, labels = np.random.default_rng(seed), torch.from_numpy(y).to(x.device)
    while True:
        order = generator.permutation(rows)
        drawn = (generator.integers(views, size=len(order)),) if views else ()
        for start in range(0, len(order) - size + 1, size):
            some = slice(start, start + size)
            yield x[(order[some], *(d[some] for d in drawn))], labels[torch.from_numpy(order[some]).to(x.device)]


def _set_apart(
    rows: NDArray[np.int64], labels: NDArray[np.int64], every: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows without every so many-th image of each class, and those images."""
    apart = np.zeros(len(rows), dtype=bool)
    shuffled = np.random.default_rng(seed).permutation(len(rows))
    for label in np.unique(labels):
        apart[shuffled[labels[shuffled] == label][every - 1 :: every]] = True
    return rows[~apart], rows[apart]


def _percents(
    probes: Probes,
    values: Values,
    rows: NDArray[np.int64],
    truth: NDArray[np.int64],
    device: torch.device,
    scale: float,
) -> list[list[float]]:
    """Of each classifier, how many percent of some rows have their class first and among the first five. [rates][2]"""
    hits = np.zeros((len(probes.rates), 2))
    for start in range(0, len(rows), _SCORED):
        some = slice(start, start + _SCORED)
        x = _scaled(values[rows[some]], scale).to(device)
        hits += [hits_among(scores, truth[some]) for scores in scores_of(probes, x)]
    return (100 * hits / len(rows)).tolist()
