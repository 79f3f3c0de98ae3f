"""k-NN accuracy of a network during training, on a small labelled set."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinocli.core.errors import DinoError
from dinocli.data.loader.plain import plain_batches
from dinocli.data.sources.indexed import Images
from dinocli.data.sources.open import splits
from dinocli.data.views.augment import normalize
from dinocli.data.views.crops import ViewsConfig
from dinocli.evals.balance import balanced_sample
from dinocli.evals.knn import is_correct
from dinocli.features.encoder import checked
from dinocli.features.store import Features, Provenance, compared
from dinocli.method.preset import Preset
from dinocli.models.network import Network

_IMAGES = 1000  # per split, balanced over the classes
_AT_ONCE = 64
_K = 20
# Evaluating an image costs about 0.15 of training on it at the same size: one forward pass instead of about ten views.
# Evaluations may take 0.05 of a run's time.
_COST, _SHARE = 0.15, 0.05
_COST_OF_ONE_VIEW = 1 / 3  # a forward pass, of a forward and a backward pass
_EVALUATIONS = 20  # per run, besides the one before the first step


class Answers(NamedTuple):
    """Accuracy of a network on a labelled set, and its scores on two sets of images.

    Attributes:
        accuracy: Accuracy on the test images, or on all images of a set without a test split, in percent.
        selection: 1 for each correctly classified image for choosing the best of several networks, and else 0. For
            k-NN, these are the training images, each classified by the others; or, in a set without a test split, every
            second image. [S]
        verdict: The same for comparing the chosen network with another: the test images, or the other half. [V]
    """

    accuracy: float
    selection: NDArray[np.bool_] | NDArray[np.floating]
    verdict: NDArray[np.bool_]


class KnnMonitor:
    """k-NN evaluation on a labelled set, which is decoded once at the size of the global views.

    Args:
        spec: Folder of class folders, or of `train` and `val` folders that contain class folders.
        preset: Preset of the evaluated networks.
        workers: Number of decoding processes.
        most: Largest number of images per split of a set with a test split, balanced over the classes.

    Attributes:
        title: Name of the score.
        key: Key of the score in `metrics.jsonl`.
        where: Images, in words.
        measured: Number of images classified per evaluation.

    Raises:
        DinoError: If the set does not exist, has no labels, or has too few classes or images for k-NN.
    """

    title, key = "k-NN", "knn"

    def __init__(self, spec: str, preset: Preset, workers: int, most: int = _IMAGES) -> None:
        self.views, self.where = preset.views, f"the images in {spec}"
        self._parts: dict[str, tuple[Tensor, Features]] = {}
        found = splits(spec, preset.images)
        # More images than a run's would include those that it chose its weights by, without a test split.
        most = most if len(found) > 1 else _IMAGES
        for name, source in found.items():
            if not isinstance(source, Images) or not source.classes:
                raise DinoError(
                    f"--monitor needs images in class folders; {source.where} has none", "DIR/CLASS/*, or no --monitor"
                )
            self._parts[name] = self._decode(balanced_sample(source, most), preset, workers)
        train, test = compared({name: plain for name, (_, plain) in self._parts.items()})
        counts = np.bincount(train.labels)
        classes, most = int(np.count_nonzero(counts)), int(counts.max())
        if classes < 2 or (test is None and most < 2):
            raise DinoError(
                f"--monitor needs at least two classes, and two images of a class; {spec} has {classes} with {most} "
                "that can be read",
                "DIR/CLASS/*, or no --monitor",
            )
        self.measured = len(train if test is None else test)
        # With few images per class, most of 20 neighbours would be of other classes even for a perfect network.
        self._k = max(1, min(_K, (len(train) - (test is None)) // classes))

    @property
    def images(self) -> int:
        """Number of images encoded per evaluation."""
        return sum(len(pixels) for pixels, _ in self._parts.values())

    def evaluate(self, network: Network) -> Answers:
        """Classify the images by k-NN. The network is not changed."""
        found = {
            name: replace(plain, values=class_tokens(network, pixels, self.views).numpy())
            for name, (pixels, plain) in self._parts.items()
        }
        train, test = compared(found)
        others = min(self._k, len(train) - 1)
        alone = is_correct(train, None, others) if others else np.zeros(len(train), np.bool_)
        if test is None:  # in the order of the classes, so that every second image is of all classes
            return Answers(100 * float(alone.mean()), alone[::2], alone[1::2])
        tested = is_correct(train, test, self._k)
        return Answers(100 * float(tested.mean()), alone, tested)

    def _decode(self, source: Images, preset: Preset, workers: int) -> tuple[Tensor, Features]:
        pixels, names, labels = decode_all(source, preset, workers)
        if len(names) < 2:
            raise DinoError(
                f"--monitor needs at least two images; {source.where} has {len(names)} that can be read",
                "check them with dino doctor",
            )
        provenance = Provenance("the run", "", "cls", 1, preset.views.global_1.size, source.where)
        empty = np.empty((len(names), 0), np.float32)
        return pixels, Features(empty, np.array(labels, np.int64), names, source.classes, {}, provenance)


def decode_all(source: Images, preset: Preset, workers: int) -> tuple[Tensor, list[str], list[int]]:
    """Decode the images of a source at the evaluation size of a preset, and skip unreadable ones.

    Returns:
        Pixels in memory [S, C, size, size], uint8, with the name and the label of each image.
    """
    views, names, labels = preset.views, [], []
    pixels = [torch.empty((0, views.channels, views.global_1.size, views.global_1.size), dtype=torch.uint8)]
    for batch in plain_batches(
        source,
        size=views.global_1.size,
        mean=(0.0,) * views.channels,
        std=(1.0,) * views.channels,
        batch_size=_AT_ONCE,
        workers=workers,
        device=torch.device("cpu"),
        images=preset.images,
    ):
        pixels.append((batch.images * 255).round().byte())  # uint8 takes a quarter of the memory
        names += batch.names
        labels += batch.labels
    return torch.cat(pixels), names, labels


def steps_between_evaluations(images: int, steps: int, batch_size: int, views: ViewsConfig) -> int:
    """Return the steps between evaluations: 20 evaluations after the first, or fewer to stay within 5 % of the time.

    A run is evaluated before its first step and after its last in any case, even if it is so short that these two take
    over 5 %. Steps count as cheap as they are with the smallest crops, because evaluations keep the full size.

    Args:
        images: Number of images encoded per evaluation, above 0.
        steps: Number of steps in the run.
        batch_size: Images per step.
        views: Views of the run; the smallest sizes decide.
    """
    smallest = min(map(_count_pixels, views.variants)) / _count_pixels(views)
    cost = (_COST if len(views.all) > 1 else _COST_OF_ONE_VIEW) / min(1, smallest)
    within = int(_SHARE * steps * batch_size / (images * cost))  # evaluations, the one before the first step included
    return max(1, math.ceil(steps / min(_EVALUATIONS, max(1, within - 1))))


def _count_pixels(views: ViewsConfig) -> int:
    return sum(view.size**2 for view in views.all)


@torch.no_grad()
def class_tokens(network: Network, pixels: Tensor, views: ViewsConfig) -> Tensor:
    """Return the class tokens of images, on the CPU, from a network in training, which is not changed.

    Args:
        network: Network on any device.
        pixels: Images on the CPU. [S, C, size, size], uint8
        views: Settings with the mean and standard deviation of each channel.

    Returns:
        [S, D], float32

    Raises:
        NotFinite: If a value is infinite or NaN.
    """
    with at_rest(network):
        images = normalized_batches(network, pixels, views)
        tokens = torch.cat([network.backbone.class_tokens(some)[0].float().cpu() for some in images])
        return checked(tokens, "values of class tokens")


def normalized_batches(network: Network, pixels: Tensor, views: ViewsConfig) -> Iterator[Tensor]:
    """Yield images in normalized batches, on the device of a network. [S, C, H, H], uint8 -> [B, C, H, H]"""
    device = next(network.parameters()).device
    mean, std = (torch.tensor(values, device=device) for values in (views.mean, views.std))
    for some in pixels.split(_AT_ONCE):
        yield normalize(some.to(device).float() / 255, mean, std)


@contextmanager
def at_rest(network: Network) -> Iterator[None]:
    """Put a network into evaluation mode, without compiled blocks, and restore it afterwards."""
    training = [m for m in network.modules() if m.training]
    network.eval()
    try:
        with network.eager():
            yield
    finally:
        for m in training:
            m.training = True
