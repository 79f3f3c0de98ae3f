from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dinocli.evals.spread import effective_rank, uniformity


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
