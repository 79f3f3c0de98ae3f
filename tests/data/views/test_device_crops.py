from __future__ import annotations

import numpy as np
import pytest
import torch

from dinocli.data.decode.turns import TURNS, turned
from dinocli.data.views import device_crops as module
from dinocli.data.views.crops import cut
from dinocli.data.views.device_crops import Stored, cut_batch

SIZES = [(40, 61), (97, 33), (24, 24), (130, 50), (16, 90), (61, 40), (200, 20), (48, 64)]
RESAMPLES = ["bicubic", "bilinear", "bicubic", "bilinear"]


def images() -> list[tuple[np.ndarray, int, torch.Tensor]]:
    """Stored pixels with edges, orientation 1 to 8, and the boxes of four crops, one of them the whole image."""
    generator, made = np.random.default_rng(0), []
    for turn, size in enumerate(SIZES, 1):
        pixels = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
        pixels[: size[0] // 2] //= 8
        height, width = turned(pixels, turn).shape[:2]
        boxes = [(0, 0, height, width)]
        for _ in range(3):
            h, w = generator.integers(5, height + 1), generator.integers(5, width + 1)
            boxes.append((generator.integers(height - h + 1), generator.integers(width - w + 1), h, w))
        made.append((pixels, turn, torch.tensor(boxes)))
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("at_once", [module._AT_ONCE, 100_000])
def test_products_cut_within_two_levels_of_the_usual_crops(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, at_once: int
) -> None:
    monkeypatch.setattr(module, "_AT_ONCE", at_once)
    groups = [torch.full((2, len(SIZES) + 1, side, side, 3), 7, dtype=torch.uint8) for side in (32, 16)]
    stored = [
        Stored.of(torch.from_numpy(pixels.transpose(2, 0, 1).copy()), turn, boxes, place)
        for place, (pixels, turn, boxes) in enumerate(images())
    ]
    cut_batch(groups, stored, RESAMPLES, dtype)
    assert all((group[:, -1] == 7).all() for group in groups), "the place of no image stays as it is"
    for place, (pixels, turn, boxes) in enumerate(images()):
        upright = turned(pixels, turn)
        for view, (box, resample) in enumerate(zip(boxes.tolist(), RESAMPLES, strict=True)):
            crop = groups[view // 2][view % 2, place]
            wanted = cut(upright, tuple(box), crop.shape[:2], resample).permute(1, 2, 0)
            difference = (crop.int() - wanted.int()).abs().float()
            assert difference.max() <= 2
            assert difference.mean() <= 0.3, "torch rounds weights to 16 bits, or numbers to float16"


def test_every_orientation_is_known() -> None:
    assert set(module._STEPS) == {1, *TURNS}


def test_images_of_any_shape_are_cut_in_parts_within_the_budget() -> None:
    shapes = [(2000, 30), (30, 2000), (40, 50), (41, 50)]
    empty = torch.zeros(1, 4)
    parts = list(module._parts([Stored(torch.empty(3, *shape), (False, False), empty, 0) for shape in shapes], 100))
    assert sorted(tuple(image.pixels.shape[1:]) for part in parts for image in part) == sorted(shapes)
    assert len(parts) == 1
    large = list(module._parts([Stored(torch.empty(3, *shape), (False, False), empty, 0) for shape in shapes], 6000))
    assert [[tuple(image.pixels.shape[1:]) for image in part] for part in large] == [
        [(30, 2000), (40, 50), (41, 50)],
        [(2000, 30)],
    ]
