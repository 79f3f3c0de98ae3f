from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import peak_of

from dinocli.core.errors import DinoError
from dinocli.evals.attention import attention_maps, default_size, enlarge
from dinocli.evals.photo_maps import activation_bytes, photo_map, stitch, tile_starts
from dinocli.features.encoder import Encoder


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def means(images: torch.Tensor) -> torch.Tensor:
    """The mean of each patch of 8 pixels. [1, C, H, W] -> [C, rows, columns]"""
    return F.avg_pool2d(images, 8)[0]


@pytest.mark.parametrize(("patches", "tile"), list(itertools.product((4, 5, 9, 31, 64), (4, 5, 8, 31))))
def test_tiles_cover_a_side_and_overlap_by_a_quarter(patches: int, tile: int) -> None:
    starts = tile_starts(7 * max(patches, tile), 7 * tile, 7)
    assert starts[0] == 0 and starts[-1] == 7 * (max(patches, tile) - tile)
    assert all(start % 7 == 0 for start in starts)
    assert all(0 < b - a <= 7 * (tile - max(1, tile // 4)) for a, b in itertools.pairwise(starts))


def test_a_map_that_depends_on_each_patch_alone_is_the_same_in_tiles(encoder: Encoder) -> None:
    whole = photo_map(encoder, noise(168, 232), 168, means)
    tiled = photo_map(encoder, noise(168, 232), 168, means, 64)
    assert whole.values.shape == (3, 21, 29) and whole.tile_share == 1
    torch.testing.assert_close(tiled.values, whole.values)
    assert tiled.tile_share == pytest.approx(8 * 8 / (21 * 29))


def test_tiles_that_disagree_are_joined_without_seams() -> None:
    """Tiles of 16 with a level of their own: a step between neighbours is a small part of the levels' difference."""
    places = [(top, left, torch.full((1, 16, 16), float(top == left))) for top in (0, 12) for left in (0, 12)]
    joined = stitch(iter(places), 28, 28)[0]
    assert joined[2, 2] == 1 and joined[2, 25] == 0, "beyond the overlap, a tile is alone"
    assert joined.min() >= 0 and joined.max() <= 1
    steps = [joined.diff(dim=dim).abs().max() for dim in (0, 1)]
    assert max(steps) < 0.5, "with hard borders it would be 1"
    assert torch.allclose(joined, joined.T) and torch.allclose(joined, joined.flip(0, 1), atol=1e-6)
    middle = joined[2, 12:16]  # squared sines of places 12.5 to 15.5 of 16, and of 0.5 to 3.5
    weights = [(np.sin(np.pi * (12.5 + i) / 16) ** 2, np.sin(np.pi * (0.5 + i) / 16) ** 2) for i in range(4)]
    assert middle.tolist() == pytest.approx([ours / (ours + theirs) for ours, theirs in weights], abs=1e-6)


def test_a_photo_smaller_than_a_tile_has_the_same_maps(encoder: Encoder) -> None:
    photo = noise(40, 60)
    assert np.array_equal(attention_maps(encoder, photo, 40, 64).heads, attention_maps(encoder, photo, 40).heads)
    large = attention_maps(encoder, noise(80, 120), 80, 64).heads
    assert large.shape == (2, 10, 15)
    assert (large.sum((1, 2)) < 1).all() and (large.sum((1, 2)) > 0.5).all(), "shares of the whole photo"
    assert default_size(encoder) == default_size(encoder, photo[:20]) < default_size(encoder, photo) == 40


def test_tiles_bound_the_memory_and_its_estimate_holds(encoder: Encoder) -> None:
    seen = []
    photo_map(encoder, noise(400, 640), 400, lambda image: seen.append(image.shape) or means(image), 64)
    assert set(seen) == {(1, 3, 64, 64)} and len(seen) == 8 * 13
    image = torch.zeros(1, 3, 256, 256)
    patches, memory = activation_bytes(encoder.backbone, 256)
    assert patches == 32 * 32
    assert 0.5 * memory < peak_of(lambda: encoder.attention(image)) < 1.5 * memory


def test_values_of_overlapping_patches_lie_at_their_centers(encoder: Encoder) -> None:
    encoder.backbone.use_stride(2)
    made = photo_map(encoder, noise(32, 40), 32, lambda image: encoder.patches(image)[0].permute(2, 0, 1))
    assert made.values.shape == (16, 13, 17)
    shown = enlarge(np.arange(13 * 17).reshape(13, 17), 32, 40, made.margins)
    y, x = np.arange(32) + 0.5, np.arange(40) + 0.5
    rows, columns = (
        np.abs(places[:, None] - (4 + 2 * np.arange(count))).argmin(1) for places, count in ((y, 13), (x, 17))
    )
    np.testing.assert_array_equal(shown, rows[:, None] * 17 + columns)


@pytest.mark.parametrize(
    ("tile", "said", "hint"),
    [
        (60, "expected a multiple of 8, at least 32", "--tile 64"),
        (16, "at least 32", "--tile 32"),
        (2048, "has 65,536 patches; expected at most 16,384", "--tile 1024 or less"),
    ],
)
def test_a_tile_that_does_not_fit_is_an_error(encoder: Encoder, tile: int, said: str, hint: str) -> None:
    with pytest.raises(DinoError, match=said) as error:
        photo_map(encoder, noise(32, 32), 32, means, tile)
    assert error.value.hint == hint
