from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dinocli.models.positions import Resampler


@pytest.mark.parametrize("case", ["p16_224"])
def test_positions_equal_the_originals(original, case: str) -> None:
    patch = original.made["posembed"][case]["patch"]
    table = original[f"posembed/{case}/pos_embed"]
    sizes = original.below(f"posembed/{case}/")
    del sizes["pos_embed"]
    for size, expected in sizes.items():
        grid = tuple(int(side) // patch for side in size.split("x"))
        # Both are float32: a CPU without AVX2 adds up the bicubic weights in another order, with errors up to 2e-6.
        torch.testing.assert_close(Resampler("dino", 1)(table, grid), expected, rtol=1e-5, atol=1e-5)


def test_antialiased_positions_differ_from_the_originals(original) -> None:
    table = original["posembed/p16_224/pos_embed"]
    dino, antialias = (Resampler(how, 1)(table, (6, 6)) for how in ("dino", "antialias"))
    relative = (dino - antialias).norm() / dino[:, 1:].norm()
    assert 0.5 < relative < 1.0, "the original's resampling at 96 pixels is far from the antialiased one"


def test_positions_of_images_that_are_not_square_are_always_interpolated() -> None:
    table = torch.randn(1, 197, 8)
    assert Resampler("dino", 1)(table, (14, 14)) is table
    assert not torch.equal(Resampler("dino", 1)(table, (14, 14), square=False), table)


@pytest.mark.parametrize("how", ["dino", "antialias"])
@pytest.mark.parametrize("grid", [(6, 6), (14, 9), (30, 47)])
def test_values_and_gradient_equal_torchs_interpolation(how: str, grid: tuple[int, int]) -> None:
    torch.manual_seed(0)
    positions = torch.randn(1, 197, 8, dtype=torch.float64, requires_grad=True)
    table = positions[:, 1:].unflatten(1, (14, 14)).permute(0, 3, 1, 2)
    if how == "dino":
        scale = ((grid[0] + 0.1) / 14, (grid[1] + 0.1) / 14)
        table = F.interpolate(table, scale_factor=scale, mode="bicubic", align_corners=False)
    else:
        table = F.interpolate(table, size=grid, mode="bicubic", align_corners=False, antialias=True)
    expected = torch.cat([positions[:, :1], table.flatten(2).transpose(1, 2)], 1)
    found = Resampler(how, 1)(positions, grid, square=False)  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-14)
    weights = torch.randn_like(expected)
    gradients = [torch.autograd.grad((values * weights).sum(), positions)[0] for values in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-13)


def test_interpolation_weights_are_computed_once_per_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    table, resample = torch.randn(1, 50, 4), Resampler("antialias", 1)
    resample(table, (3, 5))
    monkeypatch.setattr(F, "interpolate", None)  # calling it again would fail
    resample(table, (5, 3))


def test_autocast_does_not_reduce_the_precision_of_positions() -> None:
    table = torch.randn(1, 197, 8)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = Resampler("dino", 1)(table, (6, 6))
    assert torch.equal(under_autocast, Resampler("dino", 1)(table, (6, 6)))


@pytest.mark.parametrize("how", ["dino", "bicubic", "antialias"])
@pytest.mark.parametrize("grid", [(14, 14), (6, 6), (14, 9), (30, 47), (1, 2)])
def test_an_exported_graph_interpolates_to_any_size(how: str, grid: tuple[int, int]) -> None:
    """A graph has formulas instead of torch's interpolation, which it holds for a fixed size only."""
    table, resample = torch.randn(1, 197, 8), Resampler(how, 1)  # type: ignore[arg-type]
    expected = resample(table, grid, square=grid[0] == grid[1])
    torch.testing.assert_close(resample._trace(table, 14, grid), expected, rtol=1e-4, atol=1e-5)
