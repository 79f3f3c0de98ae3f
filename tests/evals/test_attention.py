from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from dinocli.evals.attention import AttentionMaps, attention_maps, default_size, enlarge, jaccard, keep_mass, overlap
from dinocli.features.encoder import Encoder
from dinocli.models.transformer import ViTBackbone


@pytest.mark.parametrize("size", ["32x32", "24x40"])
def test_masks_equal_the_originals(original, size: str) -> None:
    attention = original[f"vit/micro32d2h2p8_f64/{size}/last_attn"][0, :, 0, 1:]
    height, width = (int(side) // 8 for side in size.split("x"))
    masks = keep_mass(attention.unflatten(-1, (height, width)).numpy(), 0.6)
    np.testing.assert_array_equal(masks, original[f"attnmask/{size}/th0.6/mask"].numpy().astype(bool))


def test_a_mask_is_the_smallest_that_holds_the_requested_share() -> None:
    maps = np.random.default_rng(0).random((3, 7, 9))
    for keep in (0.1, 0.6, 0.95):
        for values, mask in zip(maps, keep_mass(maps, keep), strict=True):
            assert values[mask].sum() / values.sum() >= keep - 1e-12
            assert (values[mask].sum() - values[mask].min()) / values.sum() < keep


@pytest.mark.parametrize(("height", "width", "grid"), [(40, 40, (4, 4)), (30, 60, (4, 8)), (90, 31, (12, 4))])
def test_maps_cover_photos_of_any_shape(height: int, width: int, grid: tuple[int, int]) -> None:
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0)
    encoder = Encoder(ViTBackbone(model, "dino").eval(), "x", "0", 32, (0.5,) * 3, (0.5,) * 3)
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    heads = attention_maps(encoder, pixels, 32).heads
    assert heads.shape == (2, *grid)
    assert (heads > 0).all()
    assert (heads.sum((1, 2)) < 1).all(), "the class token keeps a share for itself"
    assert default_size(encoder) == 72


def test_jaccard_is_intersection_over_union() -> None:
    a, b = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    assert jaccard(a, b) == 1
    a[:2], b[1:3] = True, True
    assert jaccard(a, b) == pytest.approx(1 / 3)


def test_enlarge_repeats_values() -> None:
    large = enlarge(np.arange(6).reshape(1, 2, 3), 4, 6)
    assert large[0].tolist() == [[0, 0, 1, 1, 2, 2]] * 2 + [[3, 3, 4, 4, 5, 5]] * 2
    assert enlarge(np.arange(6).reshape(2, 3), 5, 7).shape == (5, 7)


def test_encoder_attention_is_that_of_the_class_token() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0)
    encoder = Encoder(ViTBackbone(model, "dino").eval(), "x", "0", 32, (0.5,) * 3, (0.5,) * 3)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(encoder.attention(images).flatten(2), encoder.backbone.attention(images)[:, :, 0, 1:])


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 60_000), (3000, 1)])
def test_a_photo_of_extreme_shape_gives_a_bounded_number_of_patches(height: int, width: int) -> None:
    from dinocli.features import encoder as module

    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=8, depth=1, num_heads=1, num_classes=0)
    encoder = Encoder(ViTBackbone(model, "dino").eval(), "x", "0", 32, (0.5,) * 3, (0.5,) * 3)
    heads = attention_maps(encoder, np.zeros((height, width, 3), dtype=np.uint8), 64).heads
    assert heads[0].size <= module.MOST_PATCHES


def test_a_patch_exactly_at_the_bound_is_excluded_as_in_the_original() -> None:
    maps = np.array([[[1, 1], [1, 1]], [[1, 1], [4, 2]]], dtype=np.float32)
    assert keep_mass(maps, 0.5).tolist() == [[[False, False], [True, True]], [[False, False], [True, False]]]


def test_a_zero_map_gives_an_empty_mask_without_warnings() -> None:
    maps = np.zeros((2, 3, 4), np.float32)
    maps[1, 2, 3] = 1
    with warnings.catch_warnings(action="error"):
        kept = keep_mass(maps, 0.6)
    assert kept.sum((1, 2)).tolist() == [0, 1]


def test_each_object_counts_with_its_best_head() -> None:
    heads = np.zeros((2, 2, 4), np.float32)
    heads[0, :, :2], heads[1, :, 3] = 1, 1  # the left half, and a quarter at the right
    left, right = np.zeros((4, 8), bool), np.zeros((4, 8), bool)
    left[:, :4], right[:, 4:] = True, True
    found = overlap(AttentionMaps(heads), [left, right], 1.0)
    assert found.heads == (1, 2)
    assert found.jaccard == pytest.approx((1 + 0.5) / 2)
    assert found.per_head == pytest.approx((0.5, 0.25))
    assert overlap(AttentionMaps(heads), [right], 1.0).jaccard == pytest.approx(0.5)
