"""Fine-tuning: the images to learn from and to hold out, the recipe, and the accuracy at the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinocli.core.atomic import atomic
from dinocli.core.config import format_toml
from dinocli.core.errors import DinoError
from dinocli.core.runs import CHECKPOINT
from dinocli.data.loader.plain import plain_batches
from dinocli.data.sources.indexed import Images
from dinocli.data.sources.open import Source, splits
from dinocli.evals.balance import shuffle_within
from dinocli.evals.calibration import fit_temperature
from dinocli.method.classification import HEAD
from dinocli.method.preset import Preset
from dinocli.models.network import Network
from dinocli.train.adapt import network_settings, parse_train
from dinocli.train.best import load_kept
from dinocli.train.held_out import Labelled, classify, score
from dinocli.train.plan import Plan, power_below
from dinocli.weights.checkpoint import write_checkpoint
from dinocli.weights.starting_point import StartingPoint

PRESET = "finetune"
_AT_ONCE = 64  # images to classify at once
_PARTED = ";|"  # separators of the classes of an image with several
_FEWEST_TO_HOLD_OUT = 4  # images of a class
_FEWEST_HELD_OUT = 2  # in all; one image cannot compare weights
_PASSES, _FEWEST_STEPS, _MOST_STEPS = 30, 600, 20_000


@dataclass(frozen=True)
class Task:
    """Images to learn from, and those to evaluate on.

    Attributes:
        classes: Names of the classes.
        train: Images to learn from.
        held_out: Images that choose the best weights and the temperature; None if there are too few.
        test: Images of a test split, if there is one.
        several: True if an image may have several classes.
        notes: Messages for the user about splits that are not used.
    """

    classes: list[str]
    train: Labelled
    held_out: Labelled | None
    test: Labelled | None
    several: bool
    notes: tuple[str, ...] = ()


def open_task(
    spec: str,
    parts: Mapping[str, Source] | None = None,
    *,
    held_out: float,
    few_shot: int | None,
    balanced: bool,
    several: bool,
    seed: int,
) -> Task:
    """Open labelled images and split off a part of the training images, the same share of every class.

    Args:
        spec: Source with class folders, or a list with labels; with `train` and `val` splits, or without.
        parts: Opened splits of `spec`. If None, they are opened here.
        held_out: Share of the training images to hold out. Classes of fewer than 4 images keep all.
        few_shot: Number of training images per class, chosen at random before the rest is held out. If None, all.
        balanced: If True, images of smaller classes repeat until all classes have as many.
        several: If True, labels are lists of classes, separated by `;` or `|`, and rows of the same image add up.
        seed: Seed of the chosen and of the held-out images.

    Raises:
        DinoError: If the images have no labels or fewer than two classes, or an option does not fit them.
    """
    parts = parts or splits(spec, several=several)
    name = next((split for split in ("train", "all") if split in parts), None)
    if name is None:
        raise DinoError(f"{spec} has no training split; it has {', '.join(parts)}", f"name the folder: {spec}/train")
    train = _check_labels(parts[name], several)
    classes = _list_classes(train, several)
    if len(classes) < 2:
        raise DinoError(
            f"{train.where} has {len(classes)} class{'es' if not classes else ''}; expected at least 2",
            "put the images into one folder per class, or name a list with a column of labels",
        )
    test, notes = _choose_test(parts, several)
    if test and (unknown := sorted(set(_list_classes(test, several)) - set(classes))):
        raise DinoError(
            f"{test.where} has the class {unknown[0]}, which {train.where} lacks", "give both the same classes"
        )
    if several and (balanced or few_shot):
        option = "--balanced" if balanced else f"--few-shot {few_shot}"
        raise DinoError(f"{option} needs one class per image, and --multi-label is set", f"remove {option}")
    # Combinations of several classes are mostly rare, so the share is that of all images.
    labels = np.zeros_like(train.labels) if several else train.labels
    number = shuffle_within(labels, (seed, _SPLIT))
    is_used = number < (few_shot or len(train))
    sizes = np.bincount(labels[is_used])
    out = np.round(held_out * sizes).astype(np.int64)
    out = np.where(sizes < _FEWEST_TO_HOLD_OUT, 0, np.maximum(out, 1 if held_out else 0))
    is_out = is_used & (number < out[labels])
    if is_out.sum() < _FEWEST_HELD_OUT:
        is_out[:] = False
    learned, aside = np.flatnonzero(is_used & ~is_out), np.flatnonzero(is_out)
    if balanced:
        learned = _repeat_rare(learned, labels)
    encoded = _encode(train, classes, several)
    return Task(
        classes,
        Labelled(train.take(learned), encoded[learned]),
        Labelled(train.take(aside), encoded[aside]) if len(aside) else None,
        Labelled(test, _encode(test, classes, several)) if test else None,
        several,
        notes,
    )


_SPLIT = 2**63 - 4  # no image has this number: the split shares no random numbers with views


def _check_labels(source: Source, several: bool) -> Images:
    if not isinstance(source, Images):
        raise DinoError(
            f"{source.where} is a stream of shards; fine-tuning needs random access to its images",
            "name a folder with one folder per class, or a list with labels",
        )
    if not source.classes:
        raise DinoError(
            f"the images in {source.where} have no labels", "use a folder per class, or a .csv list with path and label"
        )
    known = np.flatnonzero(source.labels >= 0)
    return source if several or len(known) == len(source) else source.take(known)


def _choose_test(parts: Mapping[str, Source], several: bool) -> tuple[Images | None, tuple[str, ...]]:
    """Return the labelled test images, if there are any, and notes on splits that are not used."""
    test, notes = None, []
    for name in ("val", "test"):
        if name in parts and test is not None:
            notes.append(f"note: {parts[name].where} is not used; {test.where} is the test split")
        elif name in parts:
            try:
                test = _check_labels(parts[name], several)
            except DinoError as error:
                notes.append(f"note: no test split: {error.message}")
    return test, tuple(notes)


def _list_classes(images: Images, several: bool) -> list[str]:
    if not several:
        used = np.unique(images.labels).tolist()
        return [images.classes[i] for i in used if i >= 0]
    return sorted({part for name in images.classes for part in _part(name)})


def _part(name: str) -> list[str]:
    for mark in _PARTED:
        name = name.replace(mark, "\n")
    return [part.strip() for part in name.split("\n") if part.strip()]


def _encode(images: Images, classes: list[str], several: bool) -> Tensor:
    """Return the labels as numbers of `classes` [S], or as 1 for each class of an image and else 0. [S, K]"""
    place = {name: i for i, name in enumerate(classes)}
    if not several:
        numbers = np.array([place.get(name, -1) for name in images.classes], np.int64)
        return torch.from_numpy(numbers[images.labels])
    table = torch.zeros(len(images.classes) + 1, len(classes))  # the last row is for images without a label
    for i, name in enumerate(images.classes):
        table[i, [place[part] for part in _part(name)]] = 1
    return table[torch.from_numpy(images.labels.astype(np.int64))]


def _repeat_rare(rows: NDArray[np.int64], labels: NDArray[np.int32]) -> NDArray[np.int64]:
    """Repeat the rows of smaller classes in turn, until all classes have as many as the largest."""
    own = labels[rows]
    classes, sizes = np.unique(own, return_counts=True)
    return np.concatenate([np.resize(rows[own == label], int(sizes.max())) for label in classes])


def recipe(start: StartingPoint, preset: Preset, task: Task, batch_size: int | None, train: str) -> dict[str, str]:
    """Return the settings that a fine-tuning changes in its preset, as TOML values by key.

    Args:
        start: Weights to start from.
        preset: Preset without these settings.
        task: Images to learn from.
        batch_size: Images per step, if the user chose a number.
        train: `all`, `last-BLOCKS`, `lora` or `lora-RANK`.

    Raises:
        DinoError: If `train` is none of these.
    """
    settings, backbone = network_settings(start)
    if not backbone.blocks:  # many convolutional networks of timm have no drop path
        settings["backbone.drop_path"] = 0.0
    images = len(task.train.images)
    batch = batch_size or min(preset.training.batch_size, power_below(max(2, images // 2)))
    steps = min(max(_PASSES * images // batch, _FEWEST_STEPS), _MOST_STEPS)
    settings |= {
        "training.epochs": max(2, round(steps / max(1, images // batch))),
        "training.batch_size": batch,
        "losses.labels.classes": len(task.classes),
        "losses.labels.several": task.several,
    }
    kind, number = parse_train(train)
    trained = "backbone.learning.trained"
    if kind == "lora":
        settings |= {trained: {"kind": "lora", "rank": number or 16}, "optimizer.lr.start": _HIGH_RATE}
    elif kind == "last":
        settings |= {trained: {"kind": "last", "blocks": number or 1}}
    return {key: format_toml(value) for key, value in settings.items()}


_HIGH_RATE = 5e-3  # low-rank additions need a higher rate than all weights


@dataclass(frozen=True)
class Scored:
    """Images with the logits that a classifier gives them.

    Attributes:
        where: Images, in words.
        names: File names.
        logits: [Q, K]
        labels: Class per image [Q]; or 1 for each class of an image and else 0. [Q, K]
    """

    where: str
    names: list[str]
    logits: NDArray[np.float32]
    labels: NDArray[Any]

    @property
    def accuracy(self) -> float:
        """Top-1 accuracy, or the mean average precision if images have several classes, in percent."""
        return 100 * float(score(self.logits, self.labels).mean())


@dataclass(frozen=True)
class FineTuned:
    """Result of a fine-tuning.

    Attributes:
        step: Step of the kept weights.
        temperature: Divisor of the logits that fits the held-out images best; 1 without any.
        weight: Weights of the classifier. [K, D]
        bias: Biases of the classifier. [K]
        held_out: Held-out images. None if there are none.
        test: Images of the test split. None if there is none.
        unread: Name and reason of each image that cannot be read.
    """

    step: int
    temperature: float
    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    held_out: Scored | None
    test: Scored | None
    unread: dict[str, str]


def conclude(plan: Plan, task: Task) -> FineTuned:
    """Write the best weights of a finished fine-tuning as `ckpt.safetensors`, and classify the images to evaluate on.

    The best weights are those with the highest accuracy on the held-out images, or the last ones if none are held out.
    """
    network = plan.preset.network()
    weights, step = load_kept(network, plan.out, best=task.held_out is not None)
    with atomic(plan.out / CHECKPOINT) as draft:
        write_checkpoint(draft, weights, plan.preset, step)
    network.eval().to(plan.device)
    weight, bias = (weights[f"heads.{HEAD}.linear.{key}"].float().numpy() for key in ("weight", "bias"))
    unread: dict[str, str] = {}
    parts = {"held-out images": task.held_out, "test images": task.test}
    held_out, test = (_score(plan, network, part, where, unread) for where, part in parts.items())
    fits = held_out is not None and not task.several
    temperature = fit_temperature(held_out.logits, held_out.labels) if held_out and fits else 1.0
    return FineTuned(step, temperature, weight, bias, held_out, test, unread)


def _score(plan: Plan, network: Network, part: Labelled | None, where: str, unread: dict[str, str]) -> Scored | None:
    if part is None:
        return None
    views, names, logits = plan.preset.views, list[str](), list[NDArray[np.float32]]()
    for batch in plain_batches(
        part.images,
        size=views.global_1.size,
        mean=views.mean,
        std=views.std,
        batch_size=_AT_ONCE,
        workers=plan.workers,
        device=plan.device,
        images=plan.preset.images,
    ):
        unread |= batch.bad
        if batch.names:
            names += batch.names
            logits.append(classify(network, batch.images))
    return Scored(where, names, np.concatenate(logits), part.labels_of(names)) if names else None
