"""Classifier on disk: weights or a reference to features, classes, temperature, and the origin of its features."""

from __future__ import annotations

import json
import math
import os
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dinocli.core.checksums import seal, unseal
from dinocli.core.errors import DinoError
from dinocli.core.tensors import is_of_kind, map_tensors, write_tensors
from dinocli.evals.accuracy import Interval
from dinocli.evals.calibration import sigmoid, softmax
from dinocli.evals.knn import vote_logits
from dinocli.features.store import Features, Provenance, checksum_of, compared, read_features, read_provenance

KIND = "classifier"
_AGAIN = "dino finetune DATA --from WEIGHTS, dino linear --save, or dino knn --save"
_BLOCK = 4096  # images classified at once: 33 MB of probabilities for 1000 classes


@dataclass(frozen=True, eq=False)
class LinearRule:
    """Linear classifier.

    Attributes:
        weight: Weights. [K, D]
        bias: Biases. [K]
    """

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]

    @property
    def name(self) -> Literal["linear"]:
        """Name of the rule."""
        return "linear"

    def logits(self, values: NDArray[np.float32]) -> NDArray[np.floating]:
        """Return class logits. [B, D] -> [B, K]"""
        return values @ self.weight.T + self.bias


@dataclass(frozen=True, eq=False)
class VoteRule:
    """Weighted vote of the nearest labelled images.

    Attributes:
        features: Labelled images that vote.
        k: Number of neighbours.
        temperature: Temperature of the votes; each weighs exp(similarity / temperature).
    """

    features: Features
    k: int
    temperature: float

    @property
    def name(self) -> Literal["k-NN"]:
        """Name of the rule."""
        return "k-NN"

    def logits(self, values: NDArray[np.float32]) -> NDArray[np.floating]:
        """Return the logarithms of the votes. [B, D] -> [B, K]"""
        return np.concatenate(list(vote_logits(self.features, values, self.k, self.temperature)))


@dataclass(frozen=True, eq=False)
class Classifier:
    """Classifier of features.

    Attributes:
        rule: Linear classifier, or vote of labelled images.
        classes: Names of the K classes.
        provenance: Origin and settings of the features that it learned from.
        temperature: Divisor of the logits before the softmax.
        calibrated_on: Number of images that the temperature was fitted on; 0 if none.
        top1: Percent of its test images whose predicted class is correct.
        train_images: Number of images that it learned from.
        test_images: Number of its test images.
        several: True if an image may have several classes, each with a probability of its own. `top1` is then the mean
            average precision.
    """

    rule: LinearRule | VoteRule
    classes: list[str]
    provenance: Provenance
    temperature: float
    calibrated_on: int
    top1: float
    interval: Interval
    train_images: int
    test_images: int
    several: bool = False

    def probabilities(self, values: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return calibrated class probabilities. [Q, D] -> [Q, K]"""
        blocks = (values[first : first + _BLOCK] for first in range(0, len(values), _BLOCK))
        link = sigmoid if self.several else softmax
        return np.concatenate([link(self.rule.logits(block), self.temperature) for block in blocks])


def check_classifier_file(path: Path) -> None:
    """Check that a classifier would replace no other file.

    Raises:
        DinoError: If the path is a file that is no classifier.
    """
    if path.exists() and not is_of_kind(path, KIND):
        raise DinoError(
            f"{path} exists and holds no classifier; it would be overwritten",
            f"use --out {path.with_name(f'{path.stem}-classifier.safetensors')}",
        )


def write_classifier(path: Path, classifier: Classifier) -> None:
    """Write a classifier. A vote is written as a reference to the file of its features: path and checksum.

    Raises:
        OSError: If the disk is full or the place is not writable.
    """
    about: dict[str, Any] = {
        key: getattr(classifier, key)
        for key in ("temperature", "calibrated_on", "top1", "interval", "train_images", "test_images", "several")
    }
    tensors: dict[str, NDArray[np.float32]] = {}
    if isinstance(classifier.rule, LinearRule):
        tensors = {"weight": classifier.rule.weight, "bias": classifier.rule.bias}
        about |= {"rule": "linear", "crc32_of_weights": _checksum(classifier.rule)}
    else:
        place = classifier.rule.features.place
        if place is None:
            raise ValueError("the features of a saved k-NN classifier must be stored")
        about |= {
            "rule": "k-NN",
            "k": classifier.rule.k,
            "vote_temperature": classifier.rule.temperature,
            # Relative, so that a project can be moved as a whole.
            "features": os.path.relpath(place.resolve(), path.resolve().parent),
            "checksum": checksum_of(place),
        }
    metadata = {
        "dinocli": KIND,
        "classifier": json.dumps(seal(about)),
        "recipe": json.dumps(asdict(classifier.provenance)),
        "classes": json.dumps(classifier.classes),
    }
    write_tensors(path, tensors, metadata)


def read_classifier(path: Path) -> Classifier:
    """Read a classifier, and the features that it refers to.

    Raises:
        DinoError: If there is no classifier, it is corrupt, or the features that it refers to have changed.
    """
    if path.is_dir():
        inside = path / "classifier.safetensors"
        raise DinoError(
            f"{path} is a folder; expected a classifier", f"use --with {inside}" if inside.is_file() else _AGAIN
        )
    if not path.exists():
        raise DinoError(f"{path} does not exist; expected a classifier", _AGAIN)
    if not is_of_kind(path, KIND):
        raise DinoError(f"{path} holds no classifier", _AGAIN)
    try:
        tensors, metadata = map_tensors(path)
        provenance, classes = read_provenance(path, metadata, _AGAIN)
        about = unseal(metadata["classifier"])
        rule = (
            LinearRule(*(np.array(tensors[key], np.float32) for key in ("weight", "bias")))
            if about["rule"] == "linear"
            else _read_votes(path, about, provenance)
        )
        classifier = Classifier(
            rule,
            classes,
            provenance,
            float(about["temperature"]),
            int(about["calibrated_on"]),
            float(about["top1"]),
            Interval(*about["interval"]),
            int(about["train_images"]),
            int(about["test_images"]),
            bool(about["several"]),
        )
        _check(classifier, about)
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"the key {error} is missing" if isinstance(error, KeyError) else str(error)
        raise DinoError(f"{path} is damaged: {why}", _AGAIN) from error
    return classifier


def _check(classifier: Classifier, about: dict[str, Any]) -> None:
    """Check that the parts of a classifier fit together.

    Raises:
        ValueError: If they do not.
    """
    count, temperature, rule = len(classifier.classes), classifier.temperature, classifier.rule
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"its temperature is {temperature}")
    if isinstance(rule, VoteRule):
        if rule.features.classes != classifier.classes:
            raise ValueError("its classes are not those of its features")
        return
    if rule.weight.ndim != 2 or rule.weight.shape[0] != count or rule.bias.shape != (count,):
        shape = "x".join(map(str, rule.weight.shape))
        raise ValueError(f"it has {count} classes, weights of shape {shape} and {rule.bias.size} biases")
    if _checksum(rule) != about["crc32_of_weights"]:
        raise ValueError("the checksum of its weights does not match")


def _read_votes(path: Path, about: dict[str, Any], provenance: Provenance) -> VoteRule:
    place = Path(os.path.normpath(path.resolve().parent / about["features"]))
    again = f"dino knn --features {place.parent} --save"
    if not place.exists():
        raise DinoError(
            f"{path} refers to the features {place}, which do not exist",
            f"move them back there, or: dino extract CHECKPOINT {provenance.data}, then dino knn --save",
        )
    if checksum_of(place) != about["checksum"]:
        raise DinoError(f"{place} has changed since {path} was written", again)
    train, _ = compared({place.stem: read_features(place)})
    return VoteRule(train, int(about["k"]), float(about["vote_temperature"]))


def _checksum(rule: LinearRule) -> str:
    return f"{zlib.crc32(rule.bias.tobytes(), zlib.crc32(rule.weight.tobytes())):08x}"
