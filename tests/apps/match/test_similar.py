from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinocli.apps.match.correspond import PatchMap
from dinocli.apps.match.similar import draw_similarities, similarities
from dinocli.evals.units import normalized


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
    [first] = draw_similarities(tmp_path / "one.png", photos, (a, b), [(25, 15)])
    assert first == ((35, 15), pytest.approx(1))
    draw_similarities(tmp_path / "two.png", photos, (a, b), [(25, 15), (1, 1)])
    one, two = (Image.open(tmp_path / name) for name in ("one.png", "two.png"))
    assert one.width == two.width > 4 * 300 and two.height > 1.8 * one.height
