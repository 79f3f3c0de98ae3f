"""The paper's linear protocol: a classifier on augmented images."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from dinocli.core.errors import DinoError
from dinocli.data.loader.train import TrainBatches
from dinocli.data.sources.indexed import Images
from dinocli.engine import trainer as engine
from dinocli.engine.schedules import Clock, CosineByEpoch
from dinocli.evals.linear import LinearResult, Probe, folded, refuse_diverged
from dinocli.evals.predictions import joined, predict
from dinocli.evals.probes import Probes, scores_of, trainer
from dinocli.features.encoder import Encoder, TokenChoice, augmented, finite_rows


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
) -> Probe:
    """Train by the paper's protocol: SGD on randomly cropped and flipped images, encoded again in each epoch.

    Args:
        encoder: Frozen backbone.
        train: Labelled training images.
        test: Labelled test images of the same classes.
        tokens: Tokens that form a feature; the paper uses `cls` for ViT-S and `cls+avg` for ViT-B.
        blocks: Number of last blocks to concatenate; the paper uses 4 for ViT-S and 1 for ViT-B.
        size: Side of the images in pixels. If None, the encoder's training size.
        epochs: Epochs over the augmented training images.
        lr: Initial learning rate for a batch of 256; it follows a cosine, updated once per epoch.
        batch_size: Images per step.
        workers: Number of decoding processes.
        seed: Seed of the initial weights, the order and the crops.
        report: Callback after each step, with the steps done and their total.

    Raises:
        DinoError: If there are fewer training images than one batch, the images have no labels, the classes of both
            splits differ, a test image's features are not finite, or the probe diverges.

    Source: facebookresearch/dino@7c446df eval_linear.py. Accuracy is measured after the last epoch; the original
    reports the best epoch on the test images.
    """
    if tokens == "patches":
        raise DinoError(
            "--tokens patches gives many features per image; a linear probe needs one", "use --tokens cls or cls+avg"
        )
    if not train.classes or train.classes != test.classes:
        raise DinoError(
            "expected class folders with the same names in train/ and val/",
            "arrange the images as DATA/train/CLASS/* and DATA/val/CLASS/*",
        )
    if len(train) < batch_size:
        raise DinoError(
            f"--batch-size {batch_size} is larger than the {len(train)} training images",
            f"use --batch-size {len(train)} or fewer",
        )
    size = size or encoder.size
    labels = torch.from_numpy(train.labels).long()
    sample = encoder.features(torch.zeros(1, encoder.channels, size, size, device=encoder.device), tokens, blocks)
    probes = Probes(sample.shape[1], len(train.classes), [lr], seed).to(encoder.device)
    clock = Clock(len(train) // batch_size, epochs)

    train_batches = TrainBatches(
        train,
        augmented(encoder, size),
        batch_size=batch_size,
        seed=seed,
        images=encoder.images,
        workers=workers,
        device=encoder.device,
    )

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in train_batches:
            yield encoder.features(batch.global_crops[0], tokens, blocks), labels[batch.rows].to(encoder.device)

    def report_step(clock: Clock, values: engine.Values) -> None:
        report(clock.step, clock.total)

    schedule = CosineByEpoch(kind="cosine_by_epoch", start=1.0, end=0.0)
    try:
        trainer(probes, schedule, clock, batch_size).fit(batches(), clock.total, report_step)
    finally:
        train_batches.close()
    refuse_diverged(probes, "use a lower --lr, or another checkpoint")
    parts = []
    for batch in encoder.batches(test, size=size, batch_size=batch_size, workers=workers):
        if batch.names:
            truth, features = np.array(batch.labels), encoder.features(batch.images, tokens, blocks)
            for name, reason in finite_rows(features, batch.names)[1]:
                raise DinoError(f"{name}: {reason}", "remove that image; if all images fail, use another checkpoint")
            parts.append(predict(batch.names, truth, scores_of(probes, features)[0]))
    if not parts:
        raise DinoError(f"none of the {len(test)} test images in {test.where} can be read", "check these files")
    predictions = joined(parts)
    result = LinearResult(
        protocol="paper",
        top1=predictions.percent(1),
        interval=predictions.interval,
        macro=predictions.macro,
        top5=predictions.percent(5),
        lr=lr,
        sweep={},
        train_images=len(train),
        held_out=0,
        test_images=len(predictions),
        split_off=False,
        classes=len(train.classes),
        epochs=epochs,
        calibration=None,
    )
    return Probe(*folded(probes), predictions, result)
