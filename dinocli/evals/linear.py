"""Linear probe: a linear classifier on frozen features."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from dinocli.data.crops import ViewConfig, ViewsConfig
from dinocli.data.loader import TrainBatches
from dinocli.data.sources import Images
from dinocli.encoder import Encoder, TokenChoice
from dinocli.engine.method import Method, ParamGroup
from dinocli.engine.optim import LinearRule, SGDConfig
from dinocli.engine.trainer import Trainer, Values
from dinocli.errors import DinoError
from dinocli.evals.accuracy import hits_among
from dinocli.features import Features
from dinocli.schedules import Clock, Constant, Cosine, CosineByEpoch, Rate

# Thirteen rates for a batch of 256, as DINOv2's probe sweeps; features differ in scale by more than any one rate spans.
RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1, 5e-1, 1.0)
_HELD_OUT = 10  # every tenth image of a class chooses the rate
_TEST = 5  # every fifth image of a class is the test, where the data has no test of its own
_MOMENTUM = 0.9


@dataclass(frozen=True)
class LinearResult:
    """Accuracy of a linear probe.

    Attributes:
        protocol: `stored` features with a swept rate, or the `paper`'s augmented images.
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
        DinoError: There are too few images or classes.
    """
    classes = len(train.classes)
    x, y = torch.from_numpy(train.values[:]).to(device), torch.from_numpy(train.labels).to(device)
    rows = np.arange(len(train))
    if test is None:
        rows, test_rows = _set_apart(rows, train.labels, _TEST, seed)
        test_values, test_labels = train.values[test_rows], train.labels[test_rows]
    else:
        test_values, test_labels = test.values[:], test.labels
    kept, held = _set_apart(rows, train.labels[rows], _HELD_OUT, seed + 1)
    if classes < 2 or not len(held) or not len(test_labels):
        raise DinoError(
            f"two classes and {_HELD_OUT} images of one were wanted; there are {classes} classes and "
            f"{len(train)} images",
            "extract a larger labelled set",
        )
    fitted = 0

    def fit(on: NDArray[np.int64], rates: Sequence[float]) -> _Probes:
        nonlocal fitted
        probes = _Probes(x.shape[1], classes, rates, seed).to(device)
        size = min(batch_size, len(on))
        clock = Clock(len(on) // size, epochs)

        def count(clock: Clock, values: Values) -> bool:
            report(fitted * clock.total + clock.step, 2 * clock.total)
            return False

        schedule = Cosine(kind="cosine", start=1.0, end=0.0)
        _trainer(probes, schedule, clock, size).fit(_stored_batches(x, y, on, size, seed), clock.total, count)
        fitted += 1
        return probes

    probes = fit(kept, rates)
    held_hits = [
        _percent(scores, train.labels[held])[0] for scores in _scores(probes, x[torch.from_numpy(held).to(device)])
    ]
    best = int(np.argmax(held_hits))
    chosen = fit(rows, rates[best : best + 1])
    top1, top5 = _percent(_scores(chosen, torch.from_numpy(test_values).to(device))[0], test_labels)
    return LinearResult(
        "stored",
        top1,
        top5,
        rates[best],
        dict(zip(rates, held_hits, strict=True)),
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
        DinoError: There are fewer images than one batch, no labels, or other classes in the test.

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
    crop = ViewConfig(size=size, scale=(0.08, 1.0), flip=0.5, resample="bilinear")
    views = ViewsConfig(mean=encoder.mean, std=encoder.std, global_1=crop)
    labels = torch.from_numpy(train.labels).long()
    sample = encoder.features(torch.zeros(1, 3, size, size, device=encoder.device), tokens, blocks)
    probes = _Probes(sample.shape[1], len(train.classes), [lr], seed).to(encoder.device)
    clock = Clock(len(train) // batch_size, epochs)

    views_of_train = TrainBatches(
        train, views, batch_size=batch_size, seed=seed, images=encoder.images, workers=workers, device=encoder.device
    )

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in views_of_train:
            yield encoder.features(batch.global_crops[0], tokens, blocks), labels[batch.rows].to(encoder.device)

    def count(clock: Clock, values: Values) -> bool:
        report(clock.step, clock.total)
        return False

    schedule = CosineByEpoch(kind="cosine_by_epoch", start=1.0, end=0.0)
    try:
        _trainer(probes, schedule, clock, batch_size).fit(batches(), clock.total, count)
    finally:
        views_of_train.close()
    hits, images = np.zeros(2), 0
    for plain in encoder.batches(test, size=size, batch_size=batch_size, workers=workers):
        if plain.names:
            truth = np.array(plain.labels)
            hits += hits_among(_scores(probes, encoder.features(plain.images, tokens, blocks))[0], truth)
            images += len(truth)
    top1, top5 = (100 * hits / max(1, images)).tolist()
    return LinearResult("paper", top1, top5, lr, {}, len(train), 0, images, False, len(train.classes), epochs)


class _Probes(Method):
    """A linear classifier for each rate, all on the same features; they share batches and nothing else."""

    def __init__(self, width: int, classes: int, rates: Sequence[float], seed: int) -> None:
        super().__init__()
        self.rates = rates
        # Of all rates the same start, so that nothing but the rate tells them apart.
        start = torch.randn(classes, width, generator=torch.Generator().manual_seed(seed)) * 0.01
        self.weights = nn.ParameterList([start.clone() for _ in rates])
        self.biases = nn.ParameterList([torch.zeros(classes) for _ in rates])

    def scores(self, x: Tensor) -> Tensor:
        """Of each class, by each classifier, in one product. [B, D] -> [B, rates, classes]"""
        return F.linear(x, torch.cat(list(self.weights)), torch.cat(list(self.biases))).unflatten(
            1, (len(self.rates), -1)
        )

    def forward(self, part: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        x, y = part
        scores = self.scores(x)
        losses = F.cross_entropy(scores.flatten(0, 1), y.repeat_interleave(len(self.rates)), reduction="none")
        return {f"lr_{rate}": loss for rate, loss in zip(self.rates, losses.view(len(y), -1).mean(0), strict=True)}

    def param_groups(self) -> list[ParamGroup]:
        return [
            ParamGroup([w, b], decay=False, lr_scale=rate)
            for rate, w, b in zip(self.rates, self.weights, self.biases, strict=True)
        ]


def _trainer(probes: _Probes, schedule: Rate, clock: Clock, batch_size: int) -> Trainer:
    config = SGDConfig(
        kind="sgd",
        momentum=_MOMENTUM,
        lr=schedule,
        lr_rule=LinearRule(kind="linear", batch=256),
        weight_decay=Constant(kind="constant", value=0.0),
    )
    return Trainer(probes, config, clock, batch_size=batch_size)


def _stored_batches(
    x: Tensor, y: Tensor, rows: NDArray[np.int64], size: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    generator = np.random.default_rng(seed)
    while True:
        order = torch.from_numpy(generator.permutation(rows)).to(x.device)
        for start in range(0, len(order) - size + 1, size):
            chosen = order[start : start + size]
            yield x[chosen], y[chosen]


def _set_apart(
    rows: NDArray[np.int64], labels: NDArray[np.int64], every: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows without every so many-th image of each class, and those images."""
    apart = np.zeros(len(rows), dtype=bool)
    shuffled = np.random.default_rng(seed).permutation(len(rows))
    for label in np.unique(labels):
        apart[shuffled[labels[shuffled] == label][every - 1 :: every]] = True
    return rows[~apart], rows[apart]


@torch.no_grad()
def _scores(probes: _Probes, x: Tensor) -> list[NDArray[np.float32]]:
    return [s.cpu().numpy() for s in probes.scores(x).unbind(1)]


def _percent(scores: NDArray[np.float32], truth: NDArray[np.int64]) -> tuple[float, float]:
    top1, top5 = (100 * hits_among(scores, truth) / len(truth)).tolist()
    return top1, top5
