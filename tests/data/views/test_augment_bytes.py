from __future__ import annotations

import numpy as np
import pytest
import torch
from byte_views import JITTER, SIZES, WILD, in_bytes, some_crops
from no_draws import nothing
from torch import Tensor

from dinocli.data.views.augment import augment
from dinocli.data.views.augment_bytes import normalize_bytes
from dinocli.data.views.crops import NUMBERS, Draws, ViewConfig, draws


def in_floats(crops: Tensor, drawn: Draws) -> Tensor:
    channels = crops.shape[-1]
    return 255 * augment(crops, drawn, torch.zeros(channels), torch.ones(channels))


def worst(crops: Tensor, **drawn: Tensor) -> float:
    changed = Draws(**(nothing(crops.shape[1]) | drawn))
    return float((in_bytes(crops, changed) - in_floats(crops, changed)).abs().max())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["flip", "gray", "solarize"])
def test_operations_that_are_on_or_off_are_within_a_level_of_floats(name: str, size: int) -> None:
    assert worst(some_crops(size), **{name: torch.ones(1, 1, dtype=torch.bool)}) <= (1 if name == "gray" else 1e-3)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("column", [0, 1])
@pytest.mark.parametrize("factor", [0.0, 0.3, 0.61, 0.999, 1.001, 1.37, 1.4, 1.731, 2.0])
def test_brightness_and_contrast_are_within_2_levels_of_floats(channels: int, column: int, factor: float) -> None:
    factors = nothing()["factors"]
    factors[0, 0, column] = factor
    assert worst(some_crops(50, channels=channels), factors=factors) <= 2


@pytest.mark.parametrize("factor", [0.0, 0.3, 0.8, 0.999, 1.001, 1.2, 1.731, 2.0])
def test_saturation_is_within_2_levels_of_floats(factor: float) -> None:
    factors = nothing()["factors"]
    factors[0, 0, 2] = factor
    assert worst(some_crops(50), factors=factors) <= 2


@pytest.mark.parametrize("shift", [-0.5, -0.4, -0.167, -0.1, -0.03, 0.001, 0.06, 0.1, 0.166, 0.2, 1 / 3, 0.45, 0.5])
def test_hue_is_within_2_levels_of_floats(shift: float) -> None:
    factors = nothing()["factors"]
    factors[0, 0, 3] = shift
    assert worst(some_crops(100), factors=factors) <= 2


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("radius", [0.1, 0.4, 0.7, 1.0, 1.41, 1.42, 1.8, 2.0])
def test_blur_is_within_2_levels_of_floats_at_borders_too(radius: float, size: int) -> None:
    assert worst(some_crops(size, channels=2), radius=torch.full((1, 1), radius)) <= 2


def test_a_flat_image_stays_flat_under_any_blur() -> None:
    radius = torch.linspace(0.1, 2, 40)[None]
    for level in (0, 1, 127, 255):
        crops = torch.full((1, 40, 30, 30, 3), level, dtype=torch.uint8)
        assert (in_bytes(crops, Draws(**(nothing(40) | {"radius": radius}))) == level).all()


def test_views_of_a_recipe_have_the_same_statistics_as_in_floats() -> None:
    view = ViewConfig(size=40, scale=(0.25, 1.0), flip=0.5, jitter=JITTER, gray=0.2, blur=0.5, solarize=0.2)
    generator = torch.Generator().manual_seed(0)
    smooth = torch.nn.functional.interpolate(torch.rand(200, 3, 6, 6, generator=generator), 40, mode="bicubic")
    crops = (smooth.clamp(0, 1) * 255).byte().permute(0, 2, 3, 1)[None].contiguous()
    drawn = draws(np.random.default_rng(0).random((200, 1, NUMBERS)), [view])
    made, exact = in_bytes(crops, drawn).float(), in_floats(crops, drawn)
    # Solarization inverts levels from 128 on, so a level that rounding moves across this edge ends far away.
    difference = (made - exact)[~drawn.solarize].abs()
    assert difference.max() <= 6  # up to seven operations, each of which amplifies earlier errors at most twofold
    assert difference.mean() < 0.5
    assert abs((made - exact).mean()) < 0.1  # rounding does not darken the views
    for figure in (lambda x: x.mean((3, 4)), lambda x: x.std((3, 4))):
        torch.testing.assert_close(figure(made), figure(exact), rtol=0, atol=1)


def test_each_crop_depends_on_its_own_draws_only() -> None:
    view = ViewConfig(size=30, scale=(0.25, 1.0), flip=0.5, jitter=WILD, gray=0.2, blur=0.7, solarize=0.2)
    crops, numbers = some_crops(30, images=12), np.random.default_rng(1).random((12, 1, NUMBERS))
    together = in_bytes(crops, draws(numbers, [view]))
    for i in range(12):
        assert torch.equal(in_bytes(crops[:, [i]], draws(numbers[[i]], [view]))[:, 0], together[:, i])


def test_normalization_of_finished_views() -> None:
    views = torch.full((1, 2, 4, 4, 3), 255, dtype=torch.uint8)
    mean, std = torch.tensor([0.5, 0.25, 0.0]), torch.tensor([0.5, 0.25, 2.0])
    made = normalize_bytes(views, mean, std)
    assert made.shape == (1, 2, 3, 4, 4)
    torch.testing.assert_close(made[0, 1, :, 0, 0], torch.tensor([1.0, 3.0, 0.5]))
