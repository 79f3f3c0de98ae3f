"""Accuracy of a classifier during fine-tuning, on labelled images that it does not learn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinocli.core.errors import DinoError
from dinocli.data.sources.indexed import Images
from dinocli.evals.accuracy import average_precision
from dinocli.evals.balance import spaced_rows
from dinocli.method.classification import HEAD
from dinocli.method.preset import Preset
from dinocli.models.network import Network
from dinocli.train.knn_monitor import Answers, at_rest, decode_all, normalized_batches

_MOST = 5_000  # images that an evaluation during a run keeps in memory and classifies


@dataclass(frozen=True)
class Labelled:
    """Images with their labels.

    Attributes:
        images: Images with random access.
        labels: Class per image [S], int64; or 1 for each class of an image and else 0. [S, K]
    """

    images: Images
    labels: Tensor

    def sample(self, most: int) -> Labelled:
        """Return at most this many of the images, evenly spaced."""
        if len(self.images) <= most:
            return self
        rows = spaced_rows(len(self.images), most)
        return Labelled(self.images.take(rows), self.labels[rows])

    def labels_of(self, names: Sequence[str]) -> NDArray[Any]:
        """Return the labels of some images, by their names. [Q] or [Q, K]"""
        place = {name: i for i, name in enumerate(self.images.names)}
        return self.labels[[place[name] for name in names]].numpy()


class HeldOut:
    """Evaluation of a network's classifier on held-out images, which are decoded once.

    Attributes:
        title: Name of the score.
        key: Key of the score in `metrics.jsonl`.
        where: Images, in words.
        measured: Number of images classified per evaluation.

    Raises:
        DinoError: If fewer than two of the images can be read.
    """

    title, key = "accuracy", "accuracy"

    def __init__(self, held_out: Labelled, preset: Preset, workers: int) -> None:
        self.views, held_out = preset.views, held_out.sample(_MOST)
        self._pixels, names, _ = decode_all(held_out.images, preset, workers)
        if len(names) < 2:
            raise DinoError(
                f"{len(names)} of the {len(held_out.images)} held-out images can be read; expected at least 2",
                "check them with dino doctor",
            )
        self.labels = held_out.labels_of(names)
        self.measured, self.where = len(names), f"{len(names)} held-out images"
        if self.labels.ndim == 2:
            self.title = "mean average precision"

    @property
    def images(self) -> int:
        """Number of images encoded per evaluation."""
        return self.measured

    def evaluate(self, network: Network) -> Answers:
        """Classify the images. The network is not changed."""
        batches = normalized_batches(network, self._pixels, self.views)
        scores = score(np.concatenate([classify(network, batch) for batch in batches]), self.labels)
        return Answers(100 * float(scores.mean()), scores, scores if self.labels.ndim == 1 else np.empty(0, np.bool_))


def score(logits: NDArray[np.float32], labels: NDArray[Any]) -> NDArray[Any]:
    """Return 1 for each correctly classified image and else 0 [Q], or the average precision of each class. [K]

    Args:
        logits: [Q, K]
        labels: Class per image [Q]; or 1 for each class of an image and else 0. [Q, K]
    """
    return average_precision(logits, labels.astype(bool)) if labels.ndim == 2 else logits.argmax(1) == labels


@torch.no_grad()
def classify(network: Network, images: Tensor) -> NDArray[np.float32]:
    """Return the logits of a network's classifier. [B, C, size, size] -> [B, K]"""
    with at_rest(network):
        logits: NDArray[np.float32] = network([images[None]]).class_logits[HEAD][0].float().cpu().numpy()
    return logits
