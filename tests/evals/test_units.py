from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from dinocli.evals.units import normalized, unit


def drawn(count: int, width: int = 6) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, width))


@pytest.mark.parametrize("scale", [1, 1e15, 1e20, 3e37, 1e-11, 1e-20, 1e-30, 1e-37])
def test_features_of_any_finite_scale_get_length_1_without_warnings(scale: float) -> None:
    """Squares of float32 are infinite above 1e19 and zero below 1e-23."""
    values = (drawn(7, 64) * scale).astype(np.float32)
    wide = values.astype(np.float64)
    expected = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    with warnings.catch_warnings(action="error"):
        found = unit(values)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)  # a few roundings of float32
    np.testing.assert_allclose(normalized(torch.from_numpy(values)).numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(normalized(torch.from_numpy(wide)).numpy(), expected, atol=1e-12)


def test_rows_of_different_scales_are_scaled_independently() -> None:
    values = (drawn(5) * np.array([[1], [1e30], [1e-30], [0], [1e10]])).astype(np.float32)
    for lengths in (np.linalg.norm(unit(values), axis=1), normalized(torch.from_numpy(values)).norm(dim=1).numpy()):
        np.testing.assert_allclose(lengths, [1, 1, 1, 0, 1], rtol=1e-6)


def test_float16_and_the_limits_of_float32_are_scaled() -> None:
    for value in (np.float16(65504), np.float16(6e-8), np.float32(3.4e38), np.float32(1e-45)):
        row = np.full((1, 4), value)
        np.testing.assert_allclose(unit(row), 0.5, rtol=1e-6)
        np.testing.assert_allclose(normalized(torch.from_numpy(row).float()).numpy(), 0.5, rtol=1e-6)
    assert unit(np.empty((0, 4), np.float32)).shape == (0, 4)
