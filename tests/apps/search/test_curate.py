from __future__ import annotations

import numpy as np
import pytest

from dinocli.apps.search import curate as module
from dinocli.apps.search.curate import assign, clusters, held, near_to, retrieve, sample, whole_groups
from dinocli.apps.search.dedup import find_alike
from dinocli.core.errors import DinoError


def drawn(count: int, seed: int = 0, width: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a / np.linalg.norm(a, axis=1, keepdims=True)) @ (b / np.linalg.norm(b, axis=1, keepdims=True)).T


@pytest.mark.parametrize("block", [8192, 7])
def test_near_and_retrieved_rows_equal_those_of_all_cosines(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(module, "_QUERIES", block)
    pool, seeds, rows = drawn(60), drawn(11, 1), np.arange(0, 60, 2)
    table = cosines(pool, seeds)
    assert near_to(pool, rows, seeds, 0.8).tolist() == [r for r in rows.tolist() if table[r].max() >= 0.8]
    expected = {r for q in range(11) for r in sorted(rows.tolist(), key=lambda r: -table[r, q])[:3]}
    assert retrieve(pool, rows, seeds, 3).tolist() == sorted(expected)
    assert retrieve(pool, rows, seeds, 99).tolist() == rows.tolist(), "at most all rows"


def test_clusters_recover_known_groups_and_are_reproducible() -> None:
    generator = np.random.default_rng(0)
    kinds = generator.integers(0, 3, 90)
    pool = (10 * np.eye(3)[kinds] + generator.normal(size=(90, 3))).astype(np.float32)
    rows = np.flatnonzero(np.arange(90) != 5)
    centers = clusters(pool, rows, 3, seed=0)
    np.testing.assert_array_equal(centers, clusters(pool, rows, 3, seed=0))
    of = assign(pool, rows, centers)
    assert len({(k, c) for k, c in zip(kinds[rows].tolist(), of.tolist(), strict=True)}) == 3
    with pytest.raises(DinoError, match="between 1 and 89"):
        clusters(pool, rows, 90, seed=0)


def test_the_same_number_is_drawn_from_each_cluster() -> None:
    rows, of = np.arange(100, 200), np.repeat([0, 1, 2], [80, 15, 5])
    drawn = sample(rows, of, 10, seed=0)
    assert (np.diff(drawn) > 0).all()
    assert np.bincount(of[drawn - 100]).tolist() == [10, 10, 5]
    np.testing.assert_array_equal(drawn, sample(rows, of, 10, seed=0))
    assert drawn.tolist() != sample(rows, of, 10, seed=1).tolist()
    assert set(of[sample(rows, of, 10, seed=0, among=np.array([1])) - 100].tolist()) == {1}
    assert held(np.array([0, 0, 0, 0, 1, 1, 1, 4, 4, 4, 4, 4])).tolist() == [0, 4]


def test_a_group_is_removed_completely_if_one_member_is_near_a_held_out_image() -> None:
    angles = np.radians([0, 8, 16, 90, 98, 180])  # a chain of three, a pair, and a single one
    pool = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    held_out = np.array([[np.cos(np.radians(24)), np.sin(np.radians(24))]], np.float32)
    threshold = float(np.cos(np.radians(10)))
    near = near_to(pool, np.arange(6), held_out, threshold)
    members = find_alike(pool, threshold).members
    assert near.tolist() == [2], "the first and second of the group are not near"
    assert whole_groups(near, members).tolist() == [0, 1, 2]
    assert whole_groups(np.array([5]), members).tolist() == [5]
    assert whole_groups(np.array([], np.int64), members).tolist() == []


def test_a_copy_of_a_held_out_image_is_near_at_any_threshold() -> None:
    pool = drawn(400, width=96)
    assert near_to(pool, np.arange(400), pool[[7, 300]].copy(), 1.0).tolist() == [7, 300]
    both = np.concatenate([pool[:100], pool[:100] * np.float32(1 + 1e-7)])  # rounding may rank these first
    assert near_to(pool, np.arange(100), both, 1.0).tolist() == list(range(100))
