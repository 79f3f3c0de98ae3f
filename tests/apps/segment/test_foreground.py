from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dinocli.apps.segment import foreground as module
from dinocli.apps.segment.foreground import border, cut, foreground
from dinocli.core.errors import DinoError
from dinocli.evals.attention import attention_maps, keep_mass
from dinocli.evals.components import components, largest_component
from dinocli.features.encoder import Encoder
from dinocli.models.architecture import BackboneConfig


def scene(rows: int = 9, columns: int = 12, noise: float = 0.3) -> tuple[torch.Tensor, np.ndarray]:
    """Return features of an object of 12 patches on two kinds of background, and its mask."""
    random = np.random.default_rng(0)
    kinds = np.linalg.qr(random.normal(size=(8, 3)))[0].T
    kinds[2] = 0.8 * kinds[1] + 0.6 * kinds[2]  # the backgrounds are similar
    object_mask = np.zeros((rows, columns), dtype=bool)
    object_mask[3:6, 4:8] = True
    which = np.where(object_mask, 0, 1 + (np.arange(columns) > 6))
    return torch.from_numpy(kinds[which] + noise * random.normal(size=(rows, columns, 8)) / 8**0.5).float(), object_mask


def plain_cut(features: np.ndarray, tau: float) -> tuple[np.ndarray, np.ndarray]:
    """Compute TokenCut by loops as in the paper: the eigenvector, and the side of its largest absolute value."""
    rows, columns, _ = features.shape
    flat = features.reshape(rows * columns, -1).astype(np.float64)
    n = len(flat)
    weights = np.empty((n, n))
    for i in range(n):
        for j in range(n):
            cosine = flat[i] @ flat[j] / np.linalg.norm(flat[i]) / np.linalg.norm(flat[j])
            weights[i, j] = 1 if cosine > tau else 1e-5
    degree = np.diag(weights.sum(1))
    half = np.diag(weights.sum(1) ** -0.5)
    vector = (half @ np.linalg.eigh(half @ (degree - weights) @ half)[1][:, 1]).reshape(rows, columns)
    side = vector > vector.mean()
    if not side[np.unravel_index(np.abs(vector).argmax(), vector.shape)]:
        side, vector = ~side, -vector
    return vector, side


@pytest.mark.parametrize("exact", [512, 0], ids=["all eigenvectors", "LOBPCG"])
@pytest.mark.parametrize("tau", [0.2, 0.5])
def test_a_cut_equals_the_papers_definition(monkeypatch: pytest.MonkeyPatch, exact: int, tau: float) -> None:
    monkeypatch.setattr(module, "_EXACT", exact)
    for noise in (0.3, 1.0):
        features, object_mask = scene(noise=noise)
        vector, side = plain_cut(features.numpy(), tau)
        found = cut(features, tau)
        cosine = (found.values * vector).sum() / np.linalg.norm(found.values) / np.linalg.norm(vector)
        assert cosine == pytest.approx(1, abs=1e-6)
        seed = np.unravel_index(np.abs(vector).argmax(), vector.shape)
        pieces = components(side)
        np.testing.assert_array_equal(found.mask, pieces == pieces[seed])
        if noise < 1:
            np.testing.assert_array_equal(found.mask, object_mask)


def test_the_component_with_the_strongest_patch_is_selected() -> None:
    features, object_mask = scene(noise=0.1)
    features[0, 0] = features[4, 5]
    found = cut(features)
    np.testing.assert_array_equal(found.mask, object_mask)
    assert found.values[0, 0] > found.values.mean(), "it is on the same side"


def test_patches_all_similar_or_all_different_give_no_foreground() -> None:
    random = torch.Generator().manual_seed(0)
    alike = torch.ones(3, 4, 8) + 0.01 * torch.randn(3, 4, 8, generator=random)
    for features, tau in ((alike, 0.2), (torch.eye(12).view(3, 4, 12), 0.2), (torch.ones(1, 1, 5), 0.2)):
        found = cut(features, tau)
        assert not found.mask.any()
        assert not found.values.any()


def test_patches_unlike_the_border_are_the_foreground() -> None:
    features, object_mask = scene(noise=0.3)
    assert object_mask.any() and not object_mask[[0, -1]].any() and not object_mask[:, [0, -1]].any()
    found = border(features)
    np.testing.assert_array_equal(found.mask, object_mask)
    # By the definition, from moments in numpy.
    outside = np.ones(object_mask.shape, dtype=bool)
    outside[1:-1, 1:-1] = False
    values = features.double().numpy()
    mean, covariance = values[outside].mean(0), np.cov(values[outside].T, bias=True)
    covariance += 0.3 * np.trace(covariance) / len(mean) * np.eye(len(mean))
    apart = values - mean
    expected = np.einsum("rci,ij,rcj->rc", apart, np.linalg.inv(covariance), apart)
    np.testing.assert_allclose(found.values, expected, rtol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (5, 2), (4, 4)])
def test_a_photo_without_an_inside_or_with_one_color_has_no_foreground(shape: tuple[int, int]) -> None:
    features = torch.ones(*shape, 8)
    if min(shape) < 3:
        features += torch.randn(features.shape, generator=torch.Generator().manual_seed(0))
    found = border(features)
    assert found.mask.shape == shape and not found.mask.any() and not found.values.any()


def test_attention_gives_the_largest_component_of_its_mask(encoder: Encoder) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    found = foreground(encoder, pixels, 48, "attention", keep=0.5)
    mass = attention_maps(encoder, pixels, 48).heads.mean(0).astype(np.float64)
    np.testing.assert_array_equal(found.values, mass)
    np.testing.assert_array_equal(found.mask, largest_component(keep_mass(mass, 0.5)))


def test_a_cut_uses_the_keys_of_the_last_block(encoder: Encoder) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    keys = encoder.patches(encoder.photo(pixels, 48), (-1,), "key")[0]
    np.testing.assert_array_equal(foreground(encoder, pixels, 48, "cut", tau=0.5).mask, cut(keys, 0.5).mask)
    np.testing.assert_array_equal(foreground(encoder, pixels, 48, "border").mask, border(keys).mask)


@pytest.mark.parametrize("shape", [(64, 64), (64, 200), (500, 20)])
def test_a_cut_reduces_the_photo_to_a_bounded_number_of_patches(
    monkeypatch: pytest.MonkeyPatch, encoder: Encoder, shape: tuple[int, int]
) -> None:
    monkeypatch.setattr(module, "MOST_PATCHES", 60)
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    found = foreground(encoder, pixels, 200, "cut")
    assert 40 < found.mask.size < 80, "rounded to whole patches"


def test_a_convolutional_network_is_cut_by_its_output_and_has_no_attention(encoder: Encoder) -> None:
    backbone = BackboneConfig(name="resnet10t", options={}, positions="dino").build(drop_path=False).eval()
    resnet = replace(encoder, backbone=backbone)
    pixels = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    tokens = resnet.patches(resnet.photo(pixels, 96))[0]
    np.testing.assert_array_equal(foreground(resnet, pixels, 96, "cut", tau=0.9).mask, cut(tokens, 0.9).mask)
    with pytest.raises(DinoError, match="need a plain vision transformer"):
        foreground(resnet, pixels, 96, "attention")
