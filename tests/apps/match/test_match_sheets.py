from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dinocli.apps.match.correspond import PatchMap, match
from dinocli.apps.match.sheets import Compared, diffusion_maps, patch_maps, swap, write_picture
from dinocli.evals.units import normalized
from dinocli.features.encoder import Encoder


def photo(seed: int, height: int = 48, width: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_patch_maps_use_the_requested_layers_and_facet(encoder: Encoder) -> None:
    a, b = photo(0), photo(1, 32, 32)
    compared = Compared(layers=(1, 3), facet="key", short_side=32)
    ours, theirs = patch_maps(encoder, a, b, compared)
    assert ours.grid == (4, 5) and theirs.grid == (4, 4)
    assert ours.size == (48, 64) and theirs.size == (32, 32)
    expected = encoder.patches(encoder.photo(b, 32), (1, 3), "key")[0]
    torch.testing.assert_close(theirs.features, normalized(expected))
    few, _ = patch_maps(encoder, a, b, Compared(short_side=32, pca=5))
    assert few.features.shape == (4, 5, 5)
    assert patch_maps(encoder, a, b, Compared())[0].grid[0] == 4, "an encoder trained at 16 pixels uses 32"


def test_diffusion_features_are_concatenated_by_weight(encoder: Encoder) -> None:
    torch.manual_seed(0)
    layers = {48: [torch.randn(2, 3, 6), torch.randn(4, 6, 8)], 32: [torch.randn(2, 2, 6), torch.randn(4, 4, 8)]}
    model = SimpleNamespace(layers=lambda pixels, long_side: layers[len(pixels)])
    a, b = photo(0), photo(1, 32, 32)
    compared = Compared(short_side=32, diffusion=model, weight=0.3)
    joined, _ = patch_maps(encoder, a, b, compared)
    alone = patch_maps(encoder, a, b, Compared(short_side=32))
    more, _ = diffusion_maps(model, (a, b), (alone[0].features, alone[1].features), 64)
    assert more.shape == (4, 5, 14), "each layer on the encoder's grid, with all its PCA directions"
    both = torch.cat([0.7 * alone[0].features, 0.3 * normalized(more)], -1)
    torch.testing.assert_close(joined.features, normalized(both), atol=1e-5, rtol=1e-5)


def test_each_patch_is_drawn_as_its_match() -> None:
    colors = np.array([[250, 0, 0], [0, 250, 0], [0, 0, 250], [250, 250, 0]], np.uint8)
    other = np.repeat(np.repeat(colors.reshape(2, 2, 3), 30, 0), 30, 1)
    a, b = (PatchMap(torch.zeros(*grid, 1), (60, 60)) for grid in ((2, 3), (2, 2)))
    drawn = swap(other, a, b, np.array([3, 3, 0, 1, 2, 0]))
    side = drawn.shape[0] // 2
    middles = drawn[side // 2 :: side, side // 2 :: side].reshape(-1, 3)
    np.testing.assert_array_equal(middles, colors[[3, 3, 0, 1, 2, 0]])


@pytest.mark.parametrize("known", [False, True])
def test_the_picture_has_rows_for_lines_swaps_and_any_keypoints(tmp_path: Path, encoder: Encoder, known: bool) -> None:
    a, b = photo(0), photo(1, 90, 32)
    maps = patch_maps(encoder, a, b, Compared(short_side=32))
    matches = match(*maps)
    points = np.array([[1.0, 2], [40, 40]])
    write_picture(
        tmp_path / "m.png", (a, b), maps, matches, matches.mutual[:3], (points, points, 5.0) if known else None
    )
    with Image.open(tmp_path / "m.png") as picture:
        assert (2 + known) * 400 < picture.height < (2 + known) * 460
        assert 533 + 142 < picture.width < 533 + 142 + 60


def test_photos_of_other_channels_and_without_a_match_are_drawn(tmp_path: Path) -> None:
    a = np.zeros((20, 30, 1), np.uint8)
    maps = (PatchMap(normalized(torch.randn(2, 3, 4)), (20, 30)),) * 2
    write_picture(tmp_path / "m.png", (a, a), maps, match(*maps), np.array([], dtype=np.int64), None)
    assert (tmp_path / "m.png").stat().st_size > 0
