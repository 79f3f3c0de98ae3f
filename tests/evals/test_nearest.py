from __future__ import annotations

import numpy as np
import pytest

from dinocli.core.tensors import Rows
from dinocli.evals import nearest as module
from dinocli.evals.nearest import alike, bounded, nearest
from dinocli.evals.units import unit


def drawn(count: int, width: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)))


@pytest.mark.parametrize("rows_a_block", [1000, 7])
@pytest.mark.parametrize("among", [None, np.array([0, 3, 4, 17, 30, 49])])
def test_neighbours_equal_those_of_a_plain_loop(
    monkeypatch: pytest.MonkeyPatch, rows_a_block: int, among: np.ndarray | None
) -> None:
    monkeypatch.setattr(module, "_BLOCK_BYTES", rows_a_block * 6 * 4)
    monkeypatch.setattr(module, "_ROWS_PER_NEIGHBOUR", 0)
    values, queries = drawn(50), drawn(9, seed=1)
    done: list[int] = []
    cosines, found = nearest(Rows([values[:20], values[20:]]), queries, 4, among=among, report=done.append)
    allowed = range(50) if among is None else among.tolist()
    for q, query in enumerate(queries):
        best = sorted(allowed, key=lambda row: -cosine(values[row], query))[:4]
        assert found[q].tolist() == best
        assert cosines[q] == pytest.approx([cosine(values[row], query) for row in best], abs=1e-6)
    assert done[-1] == len(allowed)


@pytest.mark.parametrize("tile", [4096, 8, 7])
def test_each_similar_pair_appears_once_and_the_best_cosines_are_correct(
    monkeypatch: pytest.MonkeyPatch, tile: int
) -> None:
    monkeypatch.setattr(module, "_TILE", tile)
    values = drawn(23, 3)
    best = np.empty(23, np.float32)
    parts = list(alike(values, 0.8, best))
    pairs = [(a, b) for part in parts for a, b in zip(part.first.tolist(), part.second.tolist(), strict=True)]
    expected = [(a, b) for a in range(23) for b in range(a + 1, 23) if cosine(values[a], values[b]) >= 0.8]
    assert sorted(pairs) == expected
    assert len(expected) > 5
    for part in parts:
        for a, b, near in zip(*part[1:], strict=True):
            assert near == pytest.approx(cosine(values[a], values[b]), abs=1e-6)
    for a in range(23):
        assert best[a] == pytest.approx(max(cosine(values[a], values[b]) for b in range(23) if b != a), abs=1e-6)
    assert parts[-1].done == 23 * 22 // 2
    assert not any(len(part.first) for part in alike(values, None, best)), "no threshold, no pairs"


def copied(width: int = 64) -> np.ndarray:
    """Return features whose second half repeats the first; rounding puts cosines of equal rows below and above 1."""
    values = np.concatenate([drawn(300, width), drawn(300, width)])
    products = np.einsum("sd,sd->s", unit(values), unit(values))
    assert (products < 1).any() and (products > 1).any(), "else the test proves nothing"
    return values


@pytest.mark.parametrize("tile", [4096, 70])
def test_equal_rows_have_a_cosine_of_exactly_1_and_none_is_larger(monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    monkeypatch.setattr(module, "_TILE", tile)
    values, best = copied(), np.empty(600, np.float32)
    tiles = list(alike(values, 1.0, best))
    pairs = sorted((a, b) for part in tiles for a, b in zip(part.first.tolist(), part.second.tolist(), strict=True))
    assert pairs == [(row, row + 300) for row in range(300)]
    assert (best == 1).all()
    assert all((part.cosines == 1).all() for part in tiles)
    monkeypatch.setattr(module, "_ROWS_PER_NEIGHBOUR", 0)
    for block in (1 << 30, 1 << 12):
        monkeypatch.setattr(module, "_BLOCK_BYTES", block)
        cosines, found = nearest(values, values, 4)
        assert (cosines[:, :2] == 1).all() and (np.abs(cosines) <= 1).all()
        assert (np.sort(found[:, :2] % 300) == np.arange(600)[:, None] % 300).all()
        assert (np.diff(cosines) <= 0).all()


@pytest.mark.parametrize("scale", [1e20, 1e-20])
def test_neighbours_do_not_depend_on_the_scale_of_features(scale: float) -> None:
    values = drawn(50, 16)
    cosines, found = nearest(values, values[:9], 5)
    far, same = nearest((values * scale).astype(np.float32), (values[:9] * scale).astype(np.float32), 5)
    np.testing.assert_array_equal(same, found)
    np.testing.assert_allclose(far, cosines, atol=1e-6)


def test_missing_neighbours_stay_missing() -> None:
    cosines, rows = np.array([[1.0000001, -np.inf]], np.float32), np.array([[2, -1]])
    found = bounded(drawn(3), drawn(1), cosines, rows)
    assert found[0].tolist() == [[1.0, -np.inf]] and found[1].tolist() == [[2, -1]]


@pytest.mark.parametrize(("k", "blocks"), [(1, 8), (2, 4), (8, 1)])
def test_blocks_grow_with_k_because_each_collects_k_neighbours_anew(
    monkeypatch: pytest.MonkeyPatch, k: int, blocks: int
) -> None:
    monkeypatch.setattr(module, "_BLOCK_BYTES", 200 * 6 * 4)
    done: list[int] = []
    cosines, _ = nearest(drawn(2000), drawn(9, seed=1), k, report=done.append)
    assert len(done) == blocks
    assert (np.diff(cosines) <= 0).all()


@pytest.mark.parametrize("fast", [True, False])
def test_equally_near_rows_come_in_their_order(monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    monkeypatch.setattr(module, "multiplies_bfloat16_fast", lambda: fast)
    values = np.tile(drawn(500, 16), (6, 1))  # each row six times
    for step in (3000, 700):
        monkeypatch.setattr(module, "_BLOCK_BYTES", step * 4 * 16)
        monkeypatch.setattr(module, "_ROWS_PER_NEIGHBOUR", 0)
        _, found = nearest(values, drawn(70, 16, seed=1), 12)
        assert (found[:, :6] == found[:, :1] % 500 + 500 * np.arange(6)).all()
        assert (found[:, 6:] == found[:, 6:7] % 500 + 500 * np.arange(6)).all()


@pytest.mark.parametrize("fast", [True, False])
def test_products_are_rounded_first_only_where_the_processor_multiplies_bfloat16_fast(
    monkeypatch: pytest.MonkeyPatch, fast: bool
) -> None:
    asked: list[bool] = []
    original = module.LargestCosines
    monkeypatch.setattr(module, "multiplies_bfloat16_fast", lambda: fast)
    monkeypatch.setattr(
        module, "LargestCosines", lambda *given, rounded: asked.append(rounded) or original(*given, rounded=rounded)
    )
    values = drawn(3000, 32)
    cosines, found = nearest(values, values[:80], 4)
    assert asked == [fast]
    assert (found[:, 0] == np.arange(80)).all() and (cosines[:, 0] == 1).all()
