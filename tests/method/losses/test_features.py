from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from dinocli.method.losses.features import (
    FeaturesLossConfig,
    Moments,
    Standardizer,
    cosine_distance,
    match_grid,
    smooth_l1_distance,
)


def test_the_distances_follow_their_definitions_token_by_token() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 3, 5, dtype=torch.float64) * 2, torch.randn(2, 3, 5, dtype=torch.float64)
    pairs = [(x, y) for x, y in zip(a.reshape(-1, 5).tolist(), b.reshape(-1, 5).tolist(), strict=True)]
    cosines = [sum(p * q for p, q in zip(x, y, strict=True)) / math.hypot(*x) / math.hypot(*y) for x, y in pairs]
    assert float(cosine_distance(a, b)) == pytest.approx(1 - sum(cosines) / 6, abs=1e-12)
    gaps = [abs(p - q) for x, y in pairs for p, q in zip(x, y, strict=True)]
    huber = [gap * gap / 2 if gap < 1 else gap - 0.5 for gap in gaps]
    assert float(smooth_l1_distance(a, b)) == pytest.approx(sum(huber) / 30, abs=1e-12)


def test_distances_of_half_precision_are_computed_in_float32() -> None:
    a, b = torch.randn(4, 64).bfloat16(), torch.randn(4, 64).bfloat16()
    assert cosine_distance(a, b).dtype == smooth_l1_distance(a, b).dtype == torch.float32
    torch.testing.assert_close(cosine_distance(a, b), cosine_distance(a.float(), b.float()))


def test_a_map_is_interpolated_over_the_same_view() -> None:
    """Both grids cover the same square, so a plane stays a plane between the outermost centers."""
    rows = torch.arange(4.0)[:, None].expand(4, 4)
    fine = match_grid(rows.reshape(1, 16, 1), (4, 4), (8, 8)).reshape(8, 8)
    centers = (torch.arange(8.0) + 0.5) / 2 - 0.5
    torch.testing.assert_close(fine, centers.clamp(0, 3)[:, None].expand(8, 8))
    # Half the grid: antialiasing averages with weights 1, 3, 3, 1 over the rows around a center.
    coarse = match_grid(rows.reshape(1, 16, 1), (4, 4), (2, 2)).reshape(2, 2)
    torch.testing.assert_close(coarse[:, 0], torch.tensor([(3 * 0 + 3 * 1 + 2) / 7, (1 + 3 * 2 + 3 * 3) / 7]))
    patches = torch.randn(2, 6, 3, dtype=torch.float64)
    assert match_grid(patches, (2, 3), (2, 3)) is patches
    again = match_grid(patches, (2, 3), (5, 4))
    assert again.shape == (2, 20, 3) and again.dtype == torch.float64
    maps = patches.mT.reshape(2, 3, 2, 3)
    expected = F.interpolate(maps, (5, 4), mode="bilinear", align_corners=False)
    torch.testing.assert_close(again, expected.flatten(2).mT)


def test_moments_of_parts_are_those_of_all_rows() -> None:
    torch.manual_seed(0)
    rows = torch.randn(50, 7, dtype=torch.float64) * 3 + 1e4
    moments = Moments()
    for part in rows.split([1, 9, 40]):
        moments.add(part)
    torch.testing.assert_close(moments.mean, rows.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(moments.std, rows.std(0, correction=0), rtol=1e-9, atol=0)


def test_standardized_features_have_mean_0_and_variance_1_and_a_constant_one_is_0() -> None:
    torch.manual_seed(0)
    cls, patches = torch.randn(20, 4) * torch.tensor([1.0, 10, 100, 0]) + 5, torch.randn(20, 6, 4) * 3 - 1
    moments = Moments(), Moments()
    moments[0].add(cls)
    moments[1].add(patches.flatten(0, 1))
    standardizer = Standardizer(4)
    standardizer.fit(*moments)
    a, b = standardizer(cls, patches)
    torch.testing.assert_close(a.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(a.std(0, correction=0), torch.tensor([1.0, 1, 1, 0]), atol=1e-5, rtol=0)
    flat = b.flatten(0, 1)
    torch.testing.assert_close(flat.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(flat.std(0, correction=0), torch.ones(4), atol=1e-5, rtol=0)
    assert set(standardizer.state_dict()) == {"class_mean", "class_std", "patch_mean", "patch_std"}


def test_a_distance_without_weight_is_not_computed() -> None:
    config = FeaturesLossConfig(
        class_cosine=0, patch_cosine=0.9, patch_smooth_l1=0, adaptor={"kind": "linear"}, statistics=2
    )
    assert config.weights == {"patch_cosine": 0.9}
