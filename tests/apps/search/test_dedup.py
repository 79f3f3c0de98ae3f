from __future__ import annotations

import numpy as np
import pytest

from dinocli.apps.search import dedup
from dinocli.apps.search.dedup import choose, find_alike, sample_best
from dinocli.core.tensors import Rows


def test_near_duplicates_are_found_and_the_best_is_kept() -> None:
    generator = np.random.default_rng(0)
    values = generator.normal(size=(30, 16)).astype(np.float32)
    values[[5, 9]] = values[2] + 0.01 * generator.normal(size=(2, 16))
    values[20] = values[7] + 0.2 * generator.normal(size=16)
    found = find_alike(values, 0.9)
    assert [group.tolist() for group in found.members] == [[2, 5, 9], [7, 20]]
    assert found.pairs == 4
    size = {9: (800, 1), 5: (800, 2), 2: (700, 9)}
    groups = choose(found, lambda row: size.get(row, (0, 0)))
    assert [(g.kept, g.dropped) for g in groups] == [(7, [20]), (5, [2, 9])], (
        "the least certain group first; the first of equal quality"
    )
    assert groups[0].cosines == found.best[[20]].tolist()
    assert not find_alike(values, None).members
    np.testing.assert_array_equal(find_alike(values, None).best, found.best)


def test_a_threshold_of_1_finds_equal_rows() -> None:
    """Rounding often puts the cosine of equal rows below 1."""
    values = np.random.default_rng(0).normal(size=(400, 96)).astype(np.float32)
    values[200:] = values[:200]
    values[250, 3] += 1e-2
    found = find_alike(values, 1.0)
    assert [g.tolist() for g in found.members] == [[i, i + 200] for i in range(200) if i != 50]
    assert found.pairs == 199
    assert {c for group in choose(found, lambda row: (0, 0)) for c in group.cosines} == {1.0}
    assert found.best.max() == 1 and found.best[50] < 1


def large() -> np.ndarray:
    """Return features with near-duplicates, and with copies of some of both."""
    generator = np.random.default_rng(0)
    values = generator.normal(size=(900, 40)).astype(np.float32)
    values[600:700] = values[:100] + 0.1 * generator.normal(size=(100, 40))
    values[700:750] = values[50:100]
    values[750:800] = values[650:700]
    values[800:810] = values[800]
    return values


@pytest.mark.parametrize("threshold", [0.95, 0.99, 1.0])
def test_bounds_find_the_groups_of_all_pairs(monkeypatch: pytest.MonkeyPatch, threshold: float) -> None:
    values = large()
    truth = find_alike(values, threshold)
    monkeypatch.setattr(dedup, "ALL_PAIRS_UP_TO", 500)
    done: list[int] = []
    found = find_alike(Rows([values[:300], values[300:]]), threshold, done.append)
    assert [g.tolist() for g in found.members] == [g.tolist() for g in truth.members]
    assert len(found.members) > 50
    assert found.pairs == truth.pairs
    members = np.concatenate(found.members)
    np.testing.assert_allclose(found.best[members], truth.best[members], atol=1e-6)
    assert np.isnan(np.delete(found.best, members)).all()
    assert done[-1] == 900 * 899 // 2 and (np.diff(done) >= 0).all()
    chosen, expected = (choose(each, lambda row: (0, 0)) for each in (found, truth))
    assert sorted((g.kept, *g.dropped) for g in chosen) == sorted((g.kept, *g.dropped) for g in expected)
    assert not np.isnan(find_alike(values, threshold, all_pairs=True).best).any()


def test_all_pairs_are_compared_if_bounds_exclude_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dedup, "ALL_PAIRS_UP_TO", 500)
    monkeypatch.setattr(dedup, "near_pairs", lambda *given: pytest.fail("a search by bounds"))
    assert find_alike(large(), 0.1).pairs > 900
    assert not find_alike(large(), None).members


def test_equal_images_are_one_group_without_a_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dedup, "ALL_PAIRS_UP_TO", 500)
    found = find_alike(np.ones((600, 8), np.float32), 0.99)
    assert [g.tolist() for g in found.members] == [list(range(600))]
    assert found.pairs == 600 * 599 // 2
    assert (found.best == 1).all()


def test_the_sample_shows_nearest_neighbours_of_random_images(monkeypatch: pytest.MonkeyPatch) -> None:
    values = large()
    truth = find_alike(values, None).best
    np.testing.assert_allclose(sample_best(values), truth, atol=1e-6)
    monkeypatch.setattr(dedup, "_SAMPLE", 100)
    assert len(sample_best(values)) == 100
    assert set(np.round(sample_best(values), 5)) <= set(np.round(truth, 5))
