from __future__ import annotations

import sys

import numpy as np
import pytest

from dinocli.apps.plot import project as module
from dinocli.apps.plot.project import cluster, pca, project
from dinocli.core.errors import DinoError
from dinocli.evals.units import unit


def clouds(count: int = 90, width: int = 12) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = np.arange(count) % 3
    return (8 * np.eye(3, width)[labels] + rng.normal(size=(count, width))).astype(np.float32), labels


def test_pca_is_that_of_a_singular_value_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    values, _ = clouds()
    centered = unit(values).astype(np.float64)
    centered -= centered.mean(0)
    left, sizes, _ = np.linalg.svd(centered, full_matrices=False)
    expected = left[:, :2] * sizes[:2]
    for block in (module._BLOCK, 7):
        monkeypatch.setattr(module, "_BLOCK", block)
        points, explained = pca(values, 2)
        assert np.abs(points) == pytest.approx(np.abs(expected), abs=1e-5)
        assert explained == pytest.approx((sizes[:2] ** 2).sum() / (sizes**2).sum())


def test_the_sign_of_a_component_is_fixed() -> None:
    values, _ = clouds()
    order = np.random.default_rng(1).permutation(len(values))
    assert pca(values[order], 2)[0] == pytest.approx(pca(values, 2)[0][order], abs=1e-5)


def test_narrow_and_equal_features_are_projected_too() -> None:
    assert pca(np.ones((5, 1), np.float32), 2)[0].shape == (5, 2)
    points, explained = pca(np.ones((5, 4), np.float32), 2)
    assert np.abs(points).max() < 1e-6 and 0 <= explained <= 1
    with pytest.raises(DinoError, match="2 images; expected at least three"):
        project(np.ones((2, 4), np.float32))


def test_clusters_are_the_clouds_the_largest_first() -> None:
    values, labels = clouds()
    keep = np.r_[np.flatnonzero(labels == 0), np.flatnonzero(labels == 1)[:20], np.flatnonzero(labels == 2)[:10]]
    found = cluster(values[keep], 3)
    assert np.bincount(found).tolist() == [30, 20, 10]
    assert (found == labels[keep]).all()
    assert (cluster(values, 3, seed=1) == cluster(values, 3, seed=1)).all()
    with pytest.raises(DinoError, match="--clusters 91 is larger than the 90 images"):
        cluster(values, 91)


@pytest.mark.parametrize(("method", "library"), [("tsne", "sklearn"), ("umap", "umap")])
def test_other_projections_keep_the_clouds_apart(method: module.Method, library: str) -> None:
    pytest.importorskip(library)
    values, labels = clouds()
    done = project(values, method)
    assert done.points.shape == (90, 2) and done.points.dtype == np.float32 and done.explained is None
    centers = np.array([done.points[labels == kind].mean(0) for kind in range(3)])
    nearest = np.linalg.norm(done.points[:, None] - centers, axis=2).argmin(1)
    assert (nearest == labels).mean() > 0.95


@pytest.mark.parametrize(("method", "name"), [("tsne", "scikit-learn"), ("umap", "umap-learn")])
def test_a_missing_library_is_named(method: module.Method, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for library in ("sklearn", "umap"):
        monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(DinoError, match=f"--method {method} needs {name}") as caught:
        project(clouds()[0], method)
    assert "pip install" in caught.value.hint
