"""Projection of features to two dimensions, and clusters of them."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

import faiss
import numpy as np

from dinocli.core.errors import DinoError
from dinocli.core.tensors import Indices, Values
from dinocli.evals.units import Floats, unit

Method = Literal["pca", "tsne", "umap"]
_BLOCK = 8192  # rows read at once
_BEFORE = 50  # dimensions after the PCA before t-SNE, as its authors do
_PERPLEXITY = 30
_ROUNDS = 20  # k-means iterations


@dataclass(frozen=True)
class Projection:
    """Features in two dimensions.

    Attributes:
        points: Coordinates. [S, 2]
        explained: Share of the variance in both dimensions, for PCA; else None.
    """

    points: Floats
    method: Method
    explained: float | None


def project(values: Values, method: Method = "pca", seed: int = 0) -> Projection:
    """Project features, scaled to length 1, to two dimensions.

    Args:
        values: Features. [S, D]
        method: `pca`; `tsne` by scikit-learn, after a PCA to 50 dimensions; or `umap` by umap-learn, with cosines.
        seed: Seed of t-SNE and UMAP.

    Raises:
        DinoError: If there are fewer than three images, or a library is missing.
    """
    if len(values) < 3:
        raise DinoError(f"{len(values)} images; expected at least three", "extract the features of more images")
    if method == "pca":
        points, explained = pca(values, 2)
        return Projection(points, method, explained)
    library = _import(method)
    if method == "tsne":
        reduced, _ = pca(values, min(_BEFORE, values.shape[1]))
        perplexity = min(_PERPLEXITY, (len(values) - 1) / 3)
        made = library.TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(reduced)
    else:
        every = np.concatenate([unit(values[first : first + _BLOCK]) for first in range(0, len(values), _BLOCK)])
        neighbours = min(15, len(values) - 1)
        made = library.UMAP(n_neighbors=neighbours, metric="cosine", random_state=seed).fit_transform(every)
    return Projection(np.asarray(made, np.float32), method, None)


def pca(values: Values, dimensions: int) -> tuple[Floats, float]:
    """Return features of length 1 on their first principal components, and the share of variance in these.

    The sign of each component is fixed: its largest weight is positive. Features are read in blocks.

    Args:
        values: Features. [S, D]
        dimensions: Number of components, at most D.
    """
    blocks = range(0, len(values), _BLOCK)
    width = values.shape[1]
    total, moments = np.zeros(width), np.zeros((width, width))
    for first in blocks:
        block = unit(values[first : first + _BLOCK]).astype(np.float64)
        total += block.sum(0)
        moments += block.T @ block
    mean = total / len(values)
    sizes, directions = np.linalg.eigh(moments / len(values) - np.outer(mean, mean))
    sizes, directions = np.maximum(sizes[::-1], 0), directions[:, ::-1][:, :dimensions]
    directions = directions * np.sign(directions[np.abs(directions).argmax(0), np.arange(directions.shape[1])])
    points = np.concatenate([(unit(values[first : first + _BLOCK]) - mean) @ directions for first in blocks])
    if points.shape[1] < dimensions:  # one feature per image
        points = np.pad(points, ((0, 0), (0, dimensions - points.shape[1])))
    return points.astype(np.float32), float(sizes[:dimensions].sum() / max(sizes.sum(), 1e-30))


def cluster(values: Values, count: int, seed: int = 0) -> Indices:
    """Return the cluster of each image, by spherical k-means; the largest cluster has the number 0. [S]

    Args:
        values: Features. [S, D]
        count: Number of clusters, at most S.
        seed: Seed of the first centers.

    Raises:
        DinoError: If there are more clusters than images.
    """
    if count > len(values):
        raise DinoError(f"--clusters {count} is larger than the {len(values)} images", f"use --clusters {len(values)}")
    every = np.concatenate([unit(values[first : first + _BLOCK]) for first in range(0, len(values), _BLOCK)])
    means = faiss.Kmeans(every.shape[1], count, niter=_ROUNDS, seed=seed, spherical=True, min_points_per_centroid=1)
    means.train(every)
    found = means.index.search(every, 1)[1][:, 0]
    rank = np.empty(count, np.int64)
    rank[np.argsort(-np.bincount(found, minlength=count), kind="stable")] = np.arange(count)
    return rank[found]


def _import(method: Method) -> Any:
    try:
        return import_module("sklearn.manifold" if method == "tsne" else "umap")
    except ImportError as error:
        name, extra = ("scikit-learn", "plot") if method == "tsne" else ("umap-learn", "umap")
        raise DinoError(
            f"--method {method} needs {name}", f'pip install "dinocli[{extra}]", or use --method pca'
        ) from error
