from __future__ import annotations

import numpy as np
import pytest
import torch

from dinocli.apps.demo.drawings import draw
from dinocli.apps.segment import edges
from dinocli.apps.segment.edges import refine
from dinocli.evals.attention import enlarge, jaccard


def disc(height: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return a noisy photo of a red disc on green, and its mask."""
    y, x = np.mgrid[:height, :width]
    truth = (x - width * 0.55) ** 2 + (y - height * 0.45) ** 2 < (0.3 * min(height, width)) ** 2
    photo = np.where(truth[..., None], (180, 60, 50), (60, 130, 70)) + np.random.default_rng(seed).normal(
        0, 8, (height, width, 3)
    )
    return photo.clip(0, 255).astype(np.uint8), truth


def to_patches(truth: np.ndarray, patch: int) -> np.ndarray:
    rows, columns = truth.shape[0] // patch, truth.shape[1] // patch
    return truth[: rows * patch, : columns * patch].reshape(rows, patch, columns, patch).mean((1, 3)) > 0.5


def test_refining_follows_the_edge_of_a_disc() -> None:
    photo, truth = disc(160, 240)
    rough = to_patches(truth, 16)
    before, after = jaccard(enlarge(rough, 160, 240), truth), jaccard(refine(rough, photo), truth)
    assert before < 0.87
    assert after > 0.97


def test_refining_improves_masks_of_drawn_objects() -> None:
    gained = []
    for index in range(20):
        drawing = draw(index)
        rough = to_patches(drawing.mask, 8)
        gained.append(
            jaccard(refine(rough, drawing.image), drawing.mask) - jaccard(enlarge(rough, 96, 96), drawing.mask)
        )
    assert np.mean(gained) > 0.04
    assert np.mean(np.array(gained) > 0) > 0.8


def test_empty_and_full_masks_stay_and_a_huge_photo_is_refined_at_reduced_size(monkeypatch: pytest.MonkeyPatch) -> None:
    photo, truth = disc(64, 96)
    assert not refine(np.zeros((4, 6), dtype=bool), photo).any()
    assert refine(np.ones((4, 6), dtype=bool), photo).all()
    assert refine(np.ones((1, 1), dtype=bool), photo[:2, :3]).shape == (2, 3)
    whole = refine(to_patches(truth, 8), photo)
    monkeypatch.setattr(edges, "_PIXELS", 64 * 96 // 4)
    small = refine(to_patches(truth, 8), photo)
    assert small.shape == (64, 96)
    assert jaccard(small, whole) > 0.9
    assert (small[::2, ::2] == small[1::2, 1::2]).all(), "each pixel is repeated"


def test_coefficients_equal_least_squares_in_each_window() -> None:
    random = np.random.default_rng(0)
    height, width, reach = 19, 22, edges._CELL
    photo, mask = random.random((3, height, width)), (random.random((height, width)) > 0.5).astype(float)
    slopes, values = np.zeros((height, width, 3)), np.zeros((height, width))

    def window(row: int, column: int) -> tuple[slice, slice]:
        return slice(max(0, row - reach), row + reach + 1), slice(max(0, column - reach), column + reach + 1)

    for row in range(height):
        for column in range(width):
            x, y = photo[(slice(None), *window(row, column))].reshape(3, -1), mask[window(row, column)].ravel()
            spread = np.cov(x, bias=True) + edges._EPS * np.eye(3)
            slopes[row, column] = np.linalg.solve(spread, ((x - x.mean(1, keepdims=True)) * (y - y.mean())).mean(1))
            values[row, column] = y.mean() - slopes[row, column] @ x.mean(1)
    found = edges._fit_lines(torch.from_numpy(photo)[None].float(), torch.from_numpy(mask)[None, None].float())[0]
    for row, column in ((0, 0), (9, 11), (18, 21), (3, 20)):
        wanted = [*slopes[window(row, column)].reshape(-1, 3).mean(0), values[window(row, column)].mean()]
        np.testing.assert_allclose(found[:, row, column].numpy(), wanted, atol=2e-4)
