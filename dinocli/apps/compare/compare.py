"""Figures of networks on the same images, and verdicts on their differences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dinocli.core.errors import DinoError
from dinocli.evals.bootstrap import Difference, paired_difference
from dinocli.evals.knn import check_ks, is_correct, votable
from dinocli.evals.linear import train_probe
from dinocli.evals.spread import effective_rank, lidar, uniformity
from dinocli.features.encoder import Encoder
from dinocli.features.store import Features, compared, learned_from, subset

Answers = NDArray[np.bool_]
METRICS = {"knn": "k-NN", "linear": "linear probe"}
_SPREAD_IMAGES = 4096  # uniformity takes the square of their number


@dataclass(frozen=True)
class Figures:
    """Figures of one network.

    Attributes:
        name: Network, as the user named it.
        identity: Equal for networks with the same weights and preprocessing.
        step: Number of training steps, if the weights' file stores it.
        size: Side of the images, in pixels.
        width: Number of features per image (D).
        parameters: Number of weights.
        megabytes: Size of the weights in float32, in units of 10**6 bytes.
        images_per_second: Speed of the encoder on images in memory.
        rank: Effective rank of the features.
        uniformity: Uniformity of the features on the unit sphere; 0 if all are equal, about -4 if evenly spread.
        lidar: LiDAR of random views. None without views.
        knn: k-NN accuracy, in percent. None without labels.
        linear: Accuracy of a linear probe, in percent. None without labels, or if not trained.
    """

    name: str
    identity: str
    step: int | None
    size: int
    width: int
    parameters: int
    megabytes: float
    images_per_second: float
    rank: float
    uniformity: float
    lidar: float | None = None
    knn: float | None = None
    linear: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Result of a comparison.

    Attributes:
        data: Location of the images, as the user named it.
        networks: Figures of the networks, in the given order.
        answers: True for each test image that a network classifies correctly, by metric. [networks][metrics]
        differences: Differences of each network to the first, by metric; empty for the first.
        k: Number of neighbours of k-NN. None without labels.
        images: Number of test images with labels; without labels, of all images.
        voters: Number of training images. None without labels.
        leave_one_out: True if k-NN classifies the training images themselves.
        split: Name of the split with the test images.
        test: Features of the test images, from the first network.
    """

    data: str
    networks: list[Figures]
    answers: list[dict[str, Answers]]
    differences: list[dict[str, Difference]]
    k: int | None
    images: int
    voters: int | None
    leave_one_out: bool
    split: str
    test: Features

    @property
    def verdicts(self) -> list[str]:
        """Verdict on each network beside the first, one sentence per metric."""
        first, lines = self.networks[0], []
        for network, differences in zip(self.networks[1:], self.differences[1:], strict=True):
            if network.identity == first.identity:
                lines.append(f"{network.name} and {first.name}: no difference: the weights are the same")
            elif not differences:
                lines.append(f"{network.name} and {first.name}: no verdict without labels")
            lines += [
                state_difference(network.name, first.name, METRICS[metric], difference)
                for metric, difference in differences.items()
                if network.identity != first.identity
            ]
        return lines


def state_difference(name: str, first: str, metric: str, difference: Difference) -> str:
    """State in words how a network differs from the first one."""
    low, high = difference.low, difference.high
    if difference.verdict == "no difference":
        few = "" if difference.changed else "; all answers are the same"
        interval = f"{difference.mean:+.1f} points, 95 % interval {low:+.1f} to {high:+.1f}{few}"
        return f"{name} and {first}: no difference in {metric} beyond chance ({interval})"
    ends = (low, high) if difference.verdict == "better" else (-high, -low)
    points = f"{abs(difference.mean):.1f} points of {metric} (95 % interval {ends[0]:.1f} to {ends[1]:.1f})"
    return f"{name} is {difference.verdict} than {first} by {points}"


def measure(
    encoder: Encoder,
    name: str,
    identity: str,
    size: int,
    images_per_second: float,
    features: Mapping[str, Features],
    views: Features | None,
) -> Figures:
    """Return the figures of a network that need no labels.

    Args:
        encoder: Network to time and to count.
        name: Network, as the user named it.
        identity: Equal for networks with the same weights and preprocessing.
        size: Side of the images, in pixels.
        images_per_second: Speed of the encoder.
        features: Features by split.
        views: Features of random views of some images, if there are any.
    """
    values = _spread_values(features)
    weights = sum(parameter.numel() for parameter in encoder.backbone.parameters())
    stored = views.views if views else None
    return Figures(
        name=name,
        identity=identity,
        step=encoder.step,
        size=size,
        width=values.shape[1],
        parameters=weights,
        megabytes=4 * weights / 1e6,
        images_per_second=images_per_second,
        rank=effective_rank(values),
        uniformity=uniformity(values),
        lidar=None if stored is None or len(stored) < 2 else lidar(torch.from_numpy(np.array(stored[:]))),
    )


def _spread_values(features: Mapping[str, Features]) -> torch.Tensor:
    """Return features of at most some thousand images, evenly spaced over the test split."""
    name = next((name for name in ("val", "test") if name in features), learned_from(features))
    values = features[name].values
    if len(values) < 2:
        raise DinoError(f"{name} has {len(values)} readable images; expected at least two", "name a folder with more")
    rows = np.unique(np.linspace(0, len(values) - 1, _SPREAD_IMAGES).astype(np.int64))
    return torch.from_numpy(values[rows])


def compare(
    data: str,
    figures: Sequence[Figures],
    features: Sequence[Mapping[str, Features]],
    *,
    k: int | None = None,
    probe: bool = True,
    seed: int = 0,
    device: torch.device,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Comparison:
    """Classify the same images with all networks, and estimate their differences to the first.

    Args:
        data: Location of the images, as the user named it.
        figures: Figures without labels of each network.
        features: Features of each network, by split.
        k: Number of neighbours. If None, 20, or all if fewer.
        probe: Train a linear probe for each network.
        seed: Seed of the probes' initial weights, order and held-out images.
        device: Training device of the probes.
        report: Callback after each step of a probe, with the steps done of all probes and their total.

    Raises:
        DinoError: If the networks can read no common images, `k` is not valid, or the labels are too few or of one
            class.
    """
    common = align(features)
    labelled = [name for name, part in common[0].items() if part.classes and (part.labels >= 0).any()]
    split = learned_from(labelled or common[0])
    if not labelled:
        none: list[dict[str, Any]] = [{} for _ in figures]
        count = sum(len(part) for part in common[0].values())
        return Comparison(data, list(figures), none, none, None, count, None, False, split, common[0][split])
    pairs = [compared(each) for each in common]
    train, held = pairs[0]
    if len(train.classes) < 2:
        raise DinoError(
            f"all {len(train)} labelled images of {data} are of one class, {train.classes[0]}; expected at least two",
            "put each class in a folder of its own (data/cat/1.jpg, data/dog/2.jpg)",
        )
    k = k or min(20, votable(train, held))
    voters = check_ks(train, held, [k])
    different = len({each.identity for each in figures})
    found: dict[str, dict[str, Answers]] = {}
    for each, (learned, tested) in zip(figures, pairs, strict=True):
        if each.identity in found:
            continue
        correct = {"knn": is_correct(learned, tested, k)}
        if probe:
            before = len(found)
            correct["linear"] = _probe(
                learned,
                tested,
                seed,
                device,
                lambda step, total, before=before: report(before * total + step, different * total),  # type: ignore[misc]
            )
        found[each.identity] = correct
    answers = [found[each.identity] for each in figures]
    differences = [
        {metric: paired_difference(answers[0][metric], correct[metric]) for metric in correct} for correct in answers
    ]
    test = train if held is None else held
    scored = [replace(each, **_score(correct)) for each, correct in zip(figures, answers, strict=True)]
    if held is not None:
        split = next(name for name in ("val", "test") if name in labelled and name != split)
    return Comparison(data, scored, answers, [{}, *differences[1:]], k, len(test), voters, held is None, split, test)


def _probe(
    train: Features, test: Features | None, seed: int, device: torch.device, report: Callable[[int, int], None]
) -> Answers:
    try:
        probe = train_probe(train, test, seed=seed, device=device, report=report)
    except DinoError as error:  # too few images of a class, or it diverged
        raise DinoError(error.message, "add --no-linear, or name a larger labelled set") from error
    return probe.predictions.correct


def _score(answers: Mapping[str, Answers]) -> dict[str, Any]:
    return {metric: 100 * float(correct.mean()) for metric, correct in answers.items()}


def align(features: Sequence[Mapping[str, Features]]) -> list[dict[str, Features]]:
    """Return the features of the images that all networks have, in the same order.

    Networks skip different images if some features are not finite, or if their image settings differ.

    Raises:
        DinoError: If a split has no common image.
    """
    aligned: list[dict[str, Features]] = [{} for _ in features]
    for name in features[0]:
        parts = [each[name] for each in features]
        common = set(parts[0].paths).intersection(*(part.paths for part in parts[1:]))
        if not common:
            raise DinoError(
                f"the networks have no common image of {name}", "compare networks that read the same images"
            )
        for each, part in zip(aligned, parts, strict=True):
            rows = [row for row, path in enumerate(part.paths) if path in common]
            each[name] = subset(part, np.array(rows, np.int64))
        if any(list(each[name].paths) != list(aligned[0][name].paths) for each in aligned[1:]):
            raise DinoError(
                f"the networks have the images of {name} in different orders", "compare them with --workers 0"
            )
    return aligned
