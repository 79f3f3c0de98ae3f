from __future__ import annotations

import math

import pytest
import torch
from timm.layers import RotaryEmbeddingDinoV3

from dinocli.models.rotary import Rotary, turned

PERIODS = torch.tensor([1.0, 10.0], dtype=torch.float64)  # of a head of 8 numbers, at base 100
GRIDS = [(1, 1), (2, 3), (14, 14), (6, 17)]


@pytest.mark.parametrize("grid", GRIDS)
def test_angles_are_coordinates_over_periods(grid: tuple[int, int]) -> None:
    expected = [[0.0] * 4] * 3
    for row in range(grid[0]):
        for column in range(grid[1]):
            coordinates = [2 * (index + 0.5) / count - 1 for index, count in zip((row, column), grid, strict=True)]
            expected.append([2 * math.pi * value / period for value in coordinates for period in (1.0, 10.0)])
    angles = torch.tensor(expected, dtype=torch.float64)
    found = Rotary(prefix=3)(PERIODS, grid)
    torch.testing.assert_close(found, torch.stack([angles.cos(), angles.sin()]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("grid", GRIDS)
def test_angles_equal_timms(grid: tuple[int, int]) -> None:
    rope = RotaryEmbeddingDinoV3(64)
    sin, cos = rope.get_embed(grid).chunk(2, -1)  # each value twice, half a head apart
    found = Rotary(prefix=1)(rope.periods, grid)
    assert torch.equal(found[0, 1:], cos[:, :32])
    assert torch.equal(found[1, 1:], sin[:, :32])


def test_rotation_is_multiplication_by_a_complex_number() -> None:
    torch.manual_seed(0)
    values = torch.randn(2, 3, 1 + 6, 8, dtype=torch.float64)
    rotation = Rotary(prefix=1)(PERIODS, (2, 3))
    numbers = torch.complex(values[..., :4], values[..., 4:]) * torch.complex(*rotation)
    torch.testing.assert_close(turned(values, rotation), torch.cat([numbers.real, numbers.imag], -1))
    assert torch.equal(turned(values, rotation)[:, :, 0], values[:, :, 0]), "the class token has no position"


def test_attention_scores_depend_on_relative_positions() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    rotation = Rotary(prefix=0)(PERIODS, (4, 5))
    product = (turned(q.expand(1, 1, 20, 8), rotation) @ turned(k.expand(1, 1, 20, 8), rotation).mT).view(4, 5, 4, 5)
    torch.testing.assert_close(product[1, 1, 2, 4], product[2, 0, 3, 3], atol=1e-6, rtol=0)
    assert not torch.allclose(product[1, 1, 2, 4], product[1, 1, 3, 3])


def test_bfloat16_values_are_rotated_in_float32_and_stay_bfloat16() -> None:
    values = torch.randn(1, 1, 7, 8).bfloat16()
    rotation = Rotary(prefix=1)(PERIODS.float(), (2, 3))
    assert torch.equal(turned(values, rotation), turned(values.float(), rotation).bfloat16())
    assert not torch.equal(turned(values, rotation), turned(values, rotation.bfloat16()))


def test_angles_are_computed_once_per_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    rotary = Rotary(prefix=1)
    once = rotary(PERIODS, (3, 5))
    monkeypatch.setattr(torch, "meshgrid", None)  # calling it again would fail
    assert torch.equal(rotary(PERIODS, (3, 5)), once)
    assert not torch.equal(rotary(PERIODS, (3, 5), rescale=2.0), once)
    with pytest.raises(TypeError):
        rotary(PERIODS, (5, 3))


def test_coordinates_are_rescaled_by_one_log_uniform_factor() -> None:
    torch.manual_seed(0)
    rotary, periods = Rotary(prefix=2), torch.tensor([20.0, 40.0], dtype=torch.float64)  # angles stay below half a turn

    def angles(rescale: float) -> torch.Tensor:
        cos, sin = rotary(periods, (2, 4), rescale)
        return torch.atan2(sin, cos)

    plain, logs = angles(1.0), []
    for _ in range(300):
        found = angles(2.0)
        assert not found[:2].any(), "class token and register have no position"
        factors = found[2:] / plain[2:]
        torch.testing.assert_close(factors, factors[0, 0].expand_as(factors))
        logs.append(factors[0, 0].log2())
    drawn = torch.stack(logs)
    assert (drawn.min() < -0.95, drawn.min() >= -1) == (True, True)
    assert (drawn.max() > 0.95, drawn.max() <= 1) == (True, True)
    assert drawn.mean().abs() < 0.1
    assert drawn.std() == pytest.approx(2 / math.sqrt(12), abs=0.05)


def test_nothing_is_drawn_without_rescaling() -> None:
    before = torch.get_rng_state()
    Rotary(prefix=1)(PERIODS, (2, 2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "options",
    [
        {"rotate_half": False},
        {"normalize_coords": "max"},
        {"grid_offset": 0.5},
        {"grid_indexing": "xy"},
        {"rescale_coords": 2.0},
        {"jitter_coords": 1.5},
    ],
)
def test_rotary_positions_of_other_kinds_are_not_supported(options: dict) -> None:
    assert Rotary.reads(RotaryEmbeddingDinoV3(64))
    assert not Rotary.reads(RotaryEmbeddingDinoV3(64, **options))
    assert not Rotary.reads(None)


def test_rows_and_columns_are_jittered_by_log_uniform_factors_of_their_own() -> None:
    torch.manual_seed(0)
    rotary = Rotary(1)
    plain = rotary._get_angles(PERIODS, (2, 3))[1:]
    half = plain.shape[-1] // 2
    factors = []
    for _ in range(400):
        cos, sin = rotary(PERIODS.double(), (2, 3), jitter=1.5)
        # The largest period turns by less than half a circle, so that the angle can be read back.
        angles = torch.atan2(sin, cos)[1:]
        factors.append([float(angles[0, half - 1] / plain[0, half - 1]), float(angles[0, -1] / plain[0, -1])])
        assert torch.equal(cos[0], torch.ones_like(cos[0])), "a class token has no position"
    logs = torch.tensor(factors).log()
    bound = math.log(1.5)
    assert logs.abs().max() <= bound + 1e-4
    assert logs.mean(0).abs().max() < 0.05
    assert (logs.std(0) - bound / 3**0.5).abs().max() < 0.03, "uniform in the logarithm"
    assert torch.corrcoef(logs.T)[0, 1].abs() < 0.15, "independent"
