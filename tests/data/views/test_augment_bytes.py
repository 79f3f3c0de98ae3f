from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from no_draws import nothing
from torch import Tensor

from dinocli.data.views import augment_bytes
from dinocli.data.views.augment import augment
from dinocli.data.views.augment_bytes import (
    ByteAugmenter,
    CompiledByteAugmenter,
    changes,
    compile_library,
    normalize_bytes,
)
from dinocli.data.views.crops import NUMBERS, Draws, JitterConfig, ViewConfig, draws

JITTER = JitterConfig(probability=0.8, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
WILD = JitterConfig(probability=1, brightness=1, contrast=1, saturation=1, hue=0.5)
SIZES = [8, 17, 18, 19, 50]


def some_crops(size: int, images: int = 1, channels: int = 3) -> Tensor:
    """Return noise, edges and flat areas: all colors with all neighbours. [1, B, H, H, C]"""
    generator = torch.Generator().manual_seed(0)
    crops = torch.randint(0, 256, (1, images, size, size, channels), dtype=torch.uint8, generator=generator)
    crops[:, :, : size // 2, : size // 3] = torch.tensor([0, 255] * channels, dtype=torch.uint8)[:channels]
    crops[:, :, size // 2 :, : size // 3] //= 64
    crops[:, :, size // 2 :, : size // 3] *= 85
    return crops


def in_bytes(crops: Tensor, drawn: Draws, library: str | None = None) -> Tensor:
    """Return the views in levels. [V, B, C, H, H]"""
    made, (size, channels) = crops.clone(), crops.shape[3:]
    augmenter = CompiledByteAugmenter(channels, size, library) if library else ByteAugmenter(channels, size)
    for view, steps in zip(made, changes(drawn, [size] * len(crops)), strict=True):
        for crop, one in zip(view, steps, strict=True):
            augmenter(crop, one)
    return made.view(*crops.shape[:2], channels, size, size)


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


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_the_compiled_library_makes_the_same_bytes(channels: int) -> None:
    library = compile_library()
    if library is None:
        pytest.skip("no C++ compiler")
    calm = JitterConfig(probability=1, brightness=1, contrast=1, saturation=0, hue=0)
    for size in SIZES:
        color = {"jitter": WILD, "gray": 0.2} if channels == 3 else {"jitter": calm}
        view = ViewConfig(size=size, scale=(0.25, 1.0), flip=0.5, blur=0.7, solarize=0.2, **color)
        drawn = draws(np.random.default_rng(size).random((60, 1, NUMBERS)), [view])
        crops = some_crops(size, images=60, channels=channels)
        assert torch.equal(in_bytes(crops, drawn, library), in_bytes(crops, drawn))


def test_without_a_compiler_there_is_no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(augment_bytes, "__file__", str(tmp_path / "missing.py"))
    assert compile_library() is None


def test_normalization_of_finished_views() -> None:
    views = torch.full((1, 2, 4, 4, 3), 255, dtype=torch.uint8)
    mean, std = torch.tensor([0.5, 0.25, 0.0]), torch.tensor([0.5, 0.25, 2.0])
    made = normalize_bytes(views, mean, std)
    assert made.shape == (1, 2, 3, 4, 4)
    torch.testing.assert_close(made[0, 1, :, 0, 0], torch.tensor([1.0, 3.0, 0.5]))
