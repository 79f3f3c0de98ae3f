from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinocli.apps.match.correspond import PatchMap
from dinocli.apps.match.similar import draw_own_similarities, draw_similarities, patch_map, similarities
from dinocli.evals.units import normalized
from dinocli.features.encoder import Encoder


def a_map(rows: int, columns: int, seed: int, size: tuple[int, int]) -> PatchMap:
    features = torch.randn(rows, columns, 6, generator=torch.Generator().manual_seed(seed))
    return PatchMap(normalized(features), size)


def test_the_patch_that_holds_the_point_is_compared_with_all() -> None:
    a, b = a_map(3, 4, 0, (30, 40)), a_map(2, 5, 1, (20, 50))
    expected = (b.features.numpy() * a.features[1, 2].numpy()).sum(-1)
    assert similarities(a, b, (25, 15)) == pytest.approx(expected, abs=1e-6)
    own = similarities(a, a, (25, 15))
    assert own.shape == (3, 4) and own.argmax() == 1 * 4 + 2 and own.max() == pytest.approx(1)


def test_a_sheet_has_a_row_per_point_and_names_the_best_place(tmp_path: Path) -> None:
    a, b = a_map(3, 4, 0, (30, 40)), a_map(2, 5, 1, (20, 50))
    b.features[1, 3] = a.features[1, 2]
    photos = np.full((30, 40, 3), 90, np.uint8), np.full((20, 50, 3), 150, np.uint8)
    [[first]] = draw_similarities(tmp_path / "one.png", photos, [("x", (a, b))], [(25, 15)])
    assert first == ((35, 15), pytest.approx(1))
    draw_similarities(tmp_path / "two.png", photos, [("x", (a, b))], [(25, 15), (1, 1)])
    one, two = (Image.open(tmp_path / name) for name in ("one.png", "two.png"))
    assert one.width == two.width > 4 * 300 and two.height > 1.8 * one.height
    best = draw_similarities(tmp_path / "both.png", photos, [("x", (a, b)), ("y", (a, a))], [(25, 15)])
    assert best == [[first], [((25, 15), pytest.approx(1))]]
    assert Image.open(tmp_path / "both.png").height > 1.8 * one.height, "a row per network"


def test_a_photo_alone_has_a_map_per_point_and_a_block_per_network(tmp_path: Path) -> None:
    own, other = a_map(3, 4, 0, (300, 400)), a_map(6, 8, 1, (300, 400))
    photo = np.full((300, 400, 3), 90, np.uint8)
    [[first, second]] = draw_own_similarities(tmp_path / "one.png", photo, [("x", own)], [(250, 150), (10, 10)])
    cosines = np.sort((own.features.numpy() * own.features[1, 2].numpy()).sum(-1).ravel())
    assert first == pytest.approx((cosines[0], cosines[-2]), abs=1e-6), "the patch itself does not count"
    assert first != second
    scales = draw_own_similarities(tmp_path / "two.png", photo, [("x", own), ("y", other)], [(250, 150)])
    assert len(scales) == 2 and scales[0] == [first]
    one, two = (np.asarray(Image.open(tmp_path / name)) for name in ("one.png", "two.png"))
    assert one.shape[1] > 3 * 400 > two.shape[1] > 2 * 400 and two.shape[0] > 2 * one.shape[0]
    assert (one[7 + 142 : 7 + 158, 7 + 242 : 7 + 258] == 255).any(), "a ring around the point in the photo"


def test_a_point_selects_the_nearest_of_overlapping_patches(encoder: Encoder) -> None:
    encoder.backbone.use_stride(4)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    own, _ = patch_map(encoder, pixels, 32)  # at half the size: centers every 8 pixels of the photo, from 8
    assert own.grid == (7, 11)
    assert own.centers[0] == pytest.approx((8, 8)) and own.centers[-1] == pytest.approx((88, 56))
    assert own.holding(np.array([(13.0, 19.0), (0, 0), (95, 63)])).tolist() == [1 * 11 + 1, 0, 76]
    tiled, reduced_to = patch_map(encoder, pixels, 32, 32)
    assert tiled.grid == own.grid and reduced_to is None
