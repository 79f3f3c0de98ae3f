"""Segmentation: a linear layer that classifies patches by their frozen features."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from dinocli.apps.segment.pairs import LabelledSet, Pairs
from dinocli.apps.segment.patches import StoredPatches, store_patches
from dinocli.core.errors import DinoError
from dinocli.core.tensors import load_tensors, write_tensors
from dinocli.data.decode.pixels import Pixels
from dinocli.data.sources.label_maps import IGNORED
from dinocli.engine import trainer as engine
from dinocli.engine.method import Method, ParamGroup
from dinocli.engine.optim import AdamWConfig
from dinocli.engine.schedules import Clock, Constant, Cosine
from dinocli.features.encoder import Encoder, NotFinite

_AT_ONCE = 2**25  # largest number of logits in memory at photo resolution
_LR = 0.01
HEAD = "head.safetensors"
_KIND = "segmentation head"


@dataclass(frozen=True)
class SegmentationHead:
    """Linear layer on patch tokens.

    Attributes:
        weight: Weight matrix. [K, D]
        bias: Bias vector. [K]
        classes: Names of the K classes.
        short_side: Short side of the training photos, in pixels.
        fingerprint: Fingerprint of the encoder that makes the tokens.
    """

    weight: Tensor
    bias: Tensor
    classes: list[str]
    short_side: int
    fingerprint: str

    @property
    def is_finite(self) -> bool:
        """True if weight and bias are finite."""
        return bool(self.weight.isfinite().all() and self.bias.isfinite().all())

    def classify(self, encoder: Encoder, pixels: Pixels, short_side: int | None = None) -> NDArray[np.uint8]:
        """Return the class of each pixel: the one with the highest logit, after bilinear enlargement. [H, W]"""
        height, width = pixels.shape[:2]
        tokens = encoder.patches(encoder.photo(pixels, short_side or self.short_side))[0].cpu()
        logits = F.linear(tokens, self.weight, self.bias).permute(2, 0, 1)  # [K, rows, columns]
        best, labels = torch.full((height, width), -torch.inf), torch.zeros((height, width), dtype=torch.uint8)
        step = max(1, _AT_ONCE // (height * width))
        for first in range(0, len(logits), step):
            values, index = _enlarge(logits[None, first : first + step], (height, width))[0].max(0)
            labels = torch.where(values > best, (index + first).to(torch.uint8), labels)
            best = torch.maximum(values, best)
        return labels.numpy()


@dataclass(frozen=True)
class PixelScores:
    """Segmentation scores over all pixels with a class.

    Attributes:
        iou: Intersection over union per class of the true masks, in percent.
        miou: Mean of `iou` over classes.
        accuracy: Percent of pixels with the correct class.
    """

    iou: dict[str, float]
    miou: float
    accuracy: float


@dataclass(frozen=True)
class SegmentationResult:
    """Scores of a head on validation photos.

    Attributes:
        head: Scores of the head.
        commonest: Most frequent class among training pixels.
        baseline: Scores of predicting that class everywhere.
        val_photos: Number of validation photos.
        split_off: True if the validation photos were split off from the training photos at random.
        epochs: Epochs over the training photos.
        skipped: Photos that cannot be used, with reasons.
    """

    head: PixelScores
    commonest: str
    baseline: PixelScores
    train_photos: int
    val_photos: int
    split_off: bool
    epochs: int
    skipped: dict[str, str]


class PatchClassifier(Method):
    """Linear classifier of standardized patch features.

    Args:
        width: Feature dimension D.
        classes: Number of classes K.
        mean: Mean of the features. [D]
        std: Standard deviation of the features. [D]
    """

    def __init__(self, width: int, classes: int, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(width, classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.mean, self.std = mean, std

    def forward(self, part: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """Return the cross-entropy over the pixels with a class.

        Args:
            part: Patch features [rows, columns, D] and pixel classes [h, w] of each photo.
        """
        total, count = self.linear.bias.sum() * 0, 0
        for features, truth in part:
            logits = self.linear((features - self.mean) / self.std).permute(2, 0, 1)[None]
            large = _enlarge(logits, (truth.shape[0], truth.shape[1]))
            total = total + F.cross_entropy(large, truth[None], ignore_index=IGNORED, reduction="sum")
            count += int((truth != IGNORED).sum())
        return {"cross_entropy": total / max(1, count)}

    def param_groups(self) -> list[ParamGroup]:
        return [ParamGroup(list(self.linear.parameters()), decay=False)]

    def folded(self) -> tuple[Tensor, Tensor]:
        """Return weight and bias for features that are not standardized."""
        weight = (self.linear.weight / self.std).detach().cpu()
        return weight, self.linear.bias.detach().cpu() - weight @ self.mean.cpu()


def train_head(
    encoder: Encoder,
    data: LabelledSet,
    folder: Path,
    *,
    short_side: int,
    epochs: int = 100,
    batch_size: int = 8,
    seed: int = 0,
    report: Callable[[str, int, int], None] = lambda stage, done, of: None,
) -> tuple[SegmentationHead, SegmentationResult]:
    """Train a head on photos, and evaluate it on others at pixel resolution.

    Photo features are computed once and stored in a memory-mapped float16 file until training ends. This takes 2 D
    bytes per patch, plus one byte per pixel at the network's resolution. The loss is computed at that resolution.

    Args:
        encoder: Frozen backbone.
        data: Photos and masks.
        folder: Path next to which the features are stored.
        short_side: Short side in pixels after resizing.
        epochs: Epochs over the training photos.
        batch_size: Photos per step.
        seed: Seed of the order in which patches are drawn.
        report: Callback with the stage, the number done and the total.

    Raises:
        DinoError: If no photo of a split can be read, no validation pixel has a class, or the head diverges.
    """
    classes = len(data.classes)
    with store_patches(
        encoder, data.train, folder, short_side=short_side, report=lambda done, of: report("features", done, of)
    ) as stored:
        if not len(stored):
            raise _explain_unreadable(stored.skipped)
        device = encoder.device
        mean, std = (torch.from_numpy(values).to(device) for values in (stored.mean, stored.std))
        method = PatchClassifier(len(mean), classes, mean, std).to(device)
        size = min(batch_size, len(stored))
        clock = Clock(len(stored) // size, epochs)
        config = AdamWConfig(
            kind="adamw",
            betas=(0.9, 0.999),
            lr=Cosine(kind="cosine", start=_LR, end=0.0),
            weight_decay=Constant(kind="constant", value=0.0),
        )

        def count(clock: Clock, values: engine.Values) -> None:
            report("train", clock.step, clock.total)

        trainer = engine.Trainer(method, config, clock, batch_size=size)
        trainer.fit(_draw_batches(stored, size, seed, device), clock.total, count)
        commonest = int(stored.counts[:classes].argmax())
    head = SegmentationHead(*method.folded(), data.classes, short_side, encoder.fingerprint)
    if not head.is_finite:
        raise DinoError("the trained head has weights that are not finite", "use another --short-side")
    table, skipped, photos = _count_confusion(encoder, head, data.val, lambda done, of: report("measure", done, of))
    if not photos:
        raise _explain_unreadable(skipped)
    if not table.any():
        raise DinoError(
            f"no pixel of the {photos} validation masks has a class", "use masks that are not void everywhere"
        )
    baseline = np.zeros_like(table)
    baseline[:, commonest] = table.sum(1)
    return head, SegmentationResult(
        _compute_scores(table, data.classes),
        data.classes[commonest],
        _compute_scores(baseline, data.classes),
        len(stored),
        photos,
        data.split_off,
        epochs,
        {str(path): reason for path, reason in data.skipped.items()} | stored.skipped | skipped,
    )


def _draw_batches(
    stored: StoredPatches, size: int, seed: int, device: torch.device
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Yield endless batches, with each photo once per epoch."""
    random = np.random.default_rng(seed)
    while True:
        order = random.permutation(len(stored))
        for start in range(0, len(order) - size + 1, size):
            yield [tuple(part.to(device) for part in stored[i]) for i in order[start : start + size].tolist()]  # type: ignore[misc]


def _count_confusion(
    encoder: Encoder, head: SegmentationHead, pairs: Pairs, report: Callable[[int, int], None]
) -> tuple[NDArray[np.int64], dict[str, str], int]:
    """Return pixel counts by true and predicted class [K, K], skipped photos with reasons, and the number of photos."""
    count = len(head.classes)
    table, skipped, photos = np.zeros((count, count), dtype=np.int64), dict[str, str](), 0
    for done, photo in enumerate(pairs.masks, 1):
        read = pairs.read(photo, encoder.images)
        if isinstance(read, str):
            skipped[str(photo)] = read
        else:
            pixels, truth = read
            try:
                predicted = head.classify(encoder, pixels)
            except NotFinite as error:
                skipped[str(photo)] = error.reason
            else:
                is_labelled = truth != IGNORED
                table += np.bincount(
                    truth[is_labelled].astype(np.int64) * count + predicted[is_labelled], minlength=count * count
                ).reshape(count, count)
                photos += 1
        report(done, len(pairs.masks))
    return table, skipped, photos


def _compute_scores(table: NDArray[np.int64], classes: list[str]) -> PixelScores:
    """Compute scores from a confusion matrix [K, K]."""
    correct, truth, predicted = table.diagonal(), table.sum(1), table.sum(0)
    present = np.flatnonzero(truth)
    iou = 100 * correct[present] / (truth + predicted - correct)[present]
    by_name = dict(zip([classes[i] for i in present], iou.tolist(), strict=True))
    return PixelScores(by_name, float(iou.mean()), float(100 * correct.sum() / truth.sum()))


def _enlarge(logits: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)


def _explain_unreadable(skipped: dict[str, str]) -> DinoError:
    path, reason = next(iter(skipped.items()))
    return DinoError(f"none of the photos can be used; {path}: {reason}", "check that photo and its mask")


def write_head(path: Path, head: SegmentationHead) -> None:
    """Write a head and the settings that reading it needs."""
    about = {
        "dinocli": _KIND,
        "classes": json.dumps(head.classes),
        "short_side": str(head.short_side),
        "fingerprint": head.fingerprint,
    }
    write_tensors(path, {"weight": head.weight.numpy(), "bias": head.bias.numpy()}, about)


def read_head(path: Path, encoder: Encoder) -> SegmentationHead:
    """Read a head for the encoder that it was trained with.

    Raises:
        DinoError: If there is no head, it is corrupt, or it belongs to other weights.
    """
    if path.is_dir():
        raise DinoError(f"{path} is a folder; expected a segmentation head", f"use --classifier {path / HEAD}")
    if not path.is_file():
        raise DinoError(f"{path} does not exist; expected a segmentation head", "dino eval segment --train DATA")
    try:
        tensors, about = load_tensors(path)
        if about.get("dinocli") != _KIND:
            raise ValueError("its metadata names no segmentation head")
        classes, side = json.loads(about["classes"]), int(about["short_side"])
        head = SegmentationHead(tensors["weight"], tensors["bias"], classes, side, about["fingerprint"])
        if not head.is_finite:
            raise ValueError("its weights are not finite")
    # Different damage raises different exceptions.
    except Exception as error:
        raise DinoError(f"{path} is no segmentation head: {error}", "dino eval segment --train DATA") from error
    if head.fingerprint != encoder.fingerprint:
        raise DinoError(
            f"{path} was trained on features of other weights ({head.fingerprint}) than {encoder.source} "
            f"({encoder.fingerprint})",
            "use --checkpoint with the one it was trained with, or train another head with --train",
        )
    return head
