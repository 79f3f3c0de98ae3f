"""Class sizes: imbalance, splits that take an equal share of every class, and samples of many images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinocli.data.sources.indexed import Images

_UNEQUAL = 3  # times the images of the smallest class; a smaller imbalance is normal


def describe_imbalance(labels: NDArray[Any], classes: Sequence[str]) -> str:
    """Return a line about classes of very different sizes; an empty string if none has 3 times as many as another.

    Args:
        labels: Class of each image, none negative. [S]
        classes: Names of the classes. A class without images is not compared.
    """
    sizes = np.bincount(labels, minlength=len(classes))
    used = np.flatnonzero(sizes)
    if len(used) < 2:
        return ""
    least, most = used[sizes[used].argmin()], used[sizes[used].argmax()]
    if sizes[most] <= _UNEQUAL * sizes[least]:
        return ""
    return (
        f"imbalanced classes: {classes[most]} has {sizes[most]} training images, {classes[least]} has {sizes[least]}; "
        "macro accuracy weighs all classes equally"
    )


def number_within(labels: NDArray[Any]) -> NDArray[np.int64]:
    """Number the rows of each label from 0, in their order. [S] -> [S]"""
    order = np.argsort(labels, kind="stable")  # one sort: a pass per class takes a minute for 10,000 classes
    begins = np.flatnonzero(np.diff(labels[order], prepend=labels[order[:1]] - 1))
    numbers = np.empty(len(labels), np.int64)
    numbers[order] = np.arange(len(labels)) - np.repeat(begins, np.diff(begins, append=len(labels)))
    return numbers


def shuffle_within(labels: NDArray[Any], seed: int | Sequence[int]) -> NDArray[np.int64]:
    """Number the rows of each label from 0 in random order: a range of numbers is a random share of every class.

    Args:
        labels: Class per row. [S]
        seed: Seed of the order of rows.

    Returns:
        [S]
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    numbers = np.empty(len(labels), np.int64)
    numbers[order] = number_within(labels[order])
    return numbers


def spaced_rows(count: int, most: int) -> NDArray[np.int64]:
    """Return all rows below a count, or `most` evenly spaced ones, in which sorted classes keep their shares."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(np.int64)


def balanced_sample(source: Images, most: int) -> Images:
    """Return at most `most` images of a source, balanced over its classes; always the same ones."""
    if len(source) <= most:
        return source
    order = np.random.default_rng(0).permutation(len(source))
    # The first image of each class, then the second of each class, and so on.
    return source.take(np.sort(order[np.argsort(number_within(source.labels[order]), kind="stable")][:most]))
