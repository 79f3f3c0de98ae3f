from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from dinocli.apps.match import correspond as module
from dinocli.apps.match.correspond import PatchMap, answers, joint_pca, match, mean_pck, near_enough, pck, spread_out
from dinocli.evals.units import normalized


def patch_map(rows: int, columns: int, size: tuple[int, int], seed: int = 0) -> PatchMap:
    torch.manual_seed(seed)
    return PatchMap(normalized(torch.randn(rows, columns, 6)), size)


@pytest.mark.parametrize("block", [4, 10_000])
def test_matches_are_the_nearest_patches_in_both_directions(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(module, "_BLOCK", block)
    a, b = patch_map(5, 6, (50, 60)), patch_map(4, 3, (40, 30), seed=1)
    matches = match(a, b)
    ours, theirs = (m.features.flatten(0, 1).numpy() for m in (a, b))
    cosines = np.array([[x @ y for y in theirs] for x in ours])
    np.testing.assert_array_equal(matches.forth, cosines.argmax(1))
    np.testing.assert_array_equal(matches.back, cosines.argmax(0))
    np.testing.assert_allclose(matches.cosine, cosines.max(1), atol=1e-6)
    mutual = [i for i, j in product(range(30), range(12)) if cosines[i].argmax() == j and cosines[:, j].argmax() == i]
    assert 0 < len(mutual) < 12
    assert sorted(matches.mutual) == mutual
    assert (np.diff(matches.cosine[matches.mutual]) <= 0).all(), "the most similar first"


def test_a_points_answer_is_the_center_of_the_most_similar_patch() -> None:
    a = patch_map(2, 4, (20, 80))
    assert a.centers[:5].tolist() == [[10, 5], [30, 5], [50, 5], [70, 5], [10, 15]]
    points = np.array([[0, 0], [79.9, 19.9], [41, 9], [-3, 200]])
    assert a.holding(points).tolist() == [0, 7, 2, 4]
    shuffled = torch.randperm(8)
    b = PatchMap(a.features.flatten(0, 1)[shuffled].unflatten(0, (4, 2)), (100, 10))
    found = answers(a, b, match(a, b), points)
    where = shuffled.argsort().numpy()[[0, 7, 2, 4]]
    np.testing.assert_allclose(found, np.stack([where % 2 * 5 + 2.5, where // 2 * 25 + 12.5], 1))


def test_pck_counts_near_answers_and_compares_with_trivial_ones() -> None:
    a = patch_map(4, 4, (40, 40))
    b = PatchMap(a.features, (80, 40))
    at_a = np.array([[5.0, 5], [35, 35], [15, 25]])
    at_b = np.array([[5.0, 10], [35, 70], [15, 58]])  # the third is 8 pixels from the center of its patch
    scores = pck(a, b, match(a, b), at_a, at_b)
    assert near_enough(b, at_b, "box", 0.1) == pytest.approx(6), "the box is 30 wide and 60 high"
    assert near_enough(b, at_b, "image", 0.1) == pytest.approx(8)
    assert [s.alpha for s in scores] == [0.05, 0.1, 0.15]
    assert [s.found for s in scores] == pytest.approx([200 / 3, 200 / 3, 100])
    assert [s.same_place for s in scores] == [s.found for s in scores], "the patches have the same positions"
    assert scores[1].chance == pytest.approx(100 * 2 / 48), "one patch of 16 for each of the first two points"
    assert pck(a, b, match(a, b), at_a, at_b, "image")[1].found == 100
    elsewhere = PatchMap(a.features.flip(0), (80, 40))
    assert pck(a, elsewhere, match(a, elsewhere), at_a, at_b)[2].found == 0
    assert pck(a, elsewhere, match(a, elsewhere), at_a, at_b)[2].same_place == 100
    mean = mean_pck([scores, pck(a, elsewhere, match(a, elsewhere), at_a, at_b)])
    assert mean[2].found == 50 and mean[2].alpha == 0.15 and mean[2].same_place == 100


def test_joint_pca_keeps_the_directions_of_largest_common_variance() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(3, 4, 5) * torch.tensor([9, 1, 1e-3, 4, 1e-3]), torch.randn(2, 5) * 1e-3 + 3
    ours, theirs = joint_pca(a, b, 3)
    assert ours.shape == (3, 4, 3) and theirs.shape == (2, 3)
    both, made = (torch.cat([x.flatten(0, -2), y]) for x, y in ((a, b), (ours, theirs)))
    torch.testing.assert_close(made.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    expected = torch.linalg.svd(both - both.mean(0)).S
    torch.testing.assert_close(torch.linalg.svd(made).S, expected[:3], atol=1e-4, rtol=1e-4)
    assert joint_pca(a, b, 100)[0].shape == (3, 4, 5), "at most as many as there are"


def test_spread_out_selects_the_best_patch_per_cell() -> None:
    a = patch_map(10, 20, (100, 200))
    chosen = np.arange(200)
    some = spread_out(a, chosen, 8)
    assert some.tolist() == [0, 5, 10, 15, 100, 105, 110, 115]
    assert spread_out(a, chosen[::-1], 8).tolist() == [199, 194, 189, 184, 99, 94, 89, 84]
    assert spread_out(a, np.array([7, 6, 150]), 8).tolist() == [7, 150]
    assert len(spread_out(a, chosen, 10_000)) == 200
    assert len(spread_out(a, chosen[:0], 8)) == 0
