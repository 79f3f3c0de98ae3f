from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dinocli.evals.spread import effective_rank, lidar, uniformity


def test_rank_and_uniformity_equal_their_definitions() -> None:
    features = np.random.default_rng(0).normal(size=(9, 5)).astype(np.float32)
    sizes = np.sqrt(np.linalg.eigvalsh(features.astype(float).T @ features))
    shares = sizes / sizes.sum()
    assert effective_rank(torch.from_numpy(features)) == pytest.approx(math.exp(-(shares * np.log(shares)).sum()))
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    pairs = [math.exp(-2 * ((unit[i] - unit[j]) ** 2).sum()) for i in range(9) for j in range(i)]
    assert uniformity(torch.from_numpy(features)) == pytest.approx(math.log(sum(pairs) / len(pairs)), rel=1e-5)


def test_the_effective_rank_counts_directions() -> None:
    assert effective_rank(torch.eye(4)) == pytest.approx(4)
    assert effective_rank(torch.eye(4)[[0, 1, 0, 1]]) == pytest.approx(2)
    assert effective_rank(torch.ones(6, 8)) == pytest.approx(1)
    assert effective_rank(torch.zeros(6, 8)) == pytest.approx(1), "zero features are no error"


def test_uniformity_is_0_for_equal_features_and_independent_of_length() -> None:
    assert uniformity(torch.ones(6, 8)) == pytest.approx(0)
    features = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    assert uniformity(3 * features) == pytest.approx(uniformity(features), abs=1e-6)
    wide = torch.randn(200, 4096, generator=torch.Generator().manual_seed(0))
    assert uniformity(wide) == pytest.approx(-4, abs=0.05)


def test_features_that_are_not_finite_give_nan() -> None:
    assert math.isnan(effective_rank(torch.tensor([[1.0, math.nan], [0, 1]])))
    assert math.isnan(uniformity(torch.tensor([[1.0, math.inf], [0, 1]])))


def plain_lidar(views: np.ndarray, delta: float = 1e-4, eps: float = 1e-8) -> float:
    """Compute LiDAR from its definition, with one image and one view at a time."""
    images, count, width = views.shape
    mean = views.mean((0, 1))
    between = sum(np.outer(v.mean(0) - mean, v.mean(0) - mean) for v in views) / (images - 1)
    within = sum(np.outer(x - v.mean(0), x - v.mean(0)) for v in views for x in v) / (images * (count - 1))
    strengths = np.linalg.eigvals(np.linalg.solve(within + delta * np.eye(width), between)).real
    shares = (strengths + eps) / (strengths + eps).sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def test_lidar_is_that_of_the_plain_definition() -> None:
    generator = np.random.default_rng(0)
    views = generator.normal(size=(40, 1, 6)) * [3, 2, 1, 0.5, 0.1, 0] + 0.3 * generator.normal(size=(40, 5, 6))
    assert lidar(torch.from_numpy(views)) == pytest.approx(plain_lidar(views), rel=1e-8)


def test_lidar_counts_the_directions_that_tell_images_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.zeros(200, 1, 8)
    images[:, :, :3] = torch.randn(200, 1, 3, generator=generator)
    views = images + 0.01 * torch.randn(200, 4, 8, generator=generator)
    assert lidar(views) == pytest.approx(3, abs=0.3)
    assert lidar(torch.ones(5, 3, 8)) == pytest.approx(8)  # without any difference all directions are equal


def test_lidar_needs_two_images_with_two_views_and_finite_features() -> None:
    for shape in ((1, 3, 4), (3, 1, 4)):
        with pytest.raises(ValueError, match="expected at least two of each"):
            lidar(torch.zeros(shape))
    assert math.isnan(lidar(torch.full((3, 2, 4), torch.inf)))
