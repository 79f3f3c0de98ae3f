from __future__ import annotations

import numpy as np
import pytest

from dinocli.core.tensors import Rows
from dinocli.evals import near_pairs as module
from dinocli.evals.near_pairs import Projection, near_pairs
from dinocli.evals.nearest import alike
from dinocli.evals.units import unit


def drawn(count: int, width: int = 48, seed: int = 0) -> np.ndarray:
    """Return clustered features of falling variance, a fifth of them at known cosines to others."""
    generator = np.random.default_rng(seed)
    spread = (1 + np.arange(width)) ** -0.5
    centers = generator.normal(size=(20, width))
    values = (centers[generator.integers(0, 20, count)] + generator.normal(size=(count, width))) * spread
    some = generator.permutation(count)[: 2 * (count // 5)].reshape(2, -1)
    units = unit(values[some[0]])
    away = generator.normal(size=units.shape)
    away = unit(away - (away * units).sum(1, keepdims=True) * units)
    cosines = generator.uniform(0.9, 1, (len(units), 1))
    values[some[1]] = 7 * (cosines * units + np.sqrt(1 - cosines**2) * away)
    return values.astype(np.float32)


def found(values: np.ndarray, threshold: float, rows: np.ndarray | None = None) -> dict[tuple[int, int], float]:
    rows = np.arange(len(values)) if rows is None else rows
    tiles = list(near_pairs(values, threshold, Projection.learn(values), rows))
    assert tiles[-1].done == len(rows) * (len(rows) - 1) // 2
    assert (np.diff([tile.done for tile in tiles]) >= 0).all()
    pairs = [pair for tile in tiles for pair in zip(*(x.tolist() for x in tile[1:]), strict=True)]
    assert len({pair[:2] for pair in pairs}) == len(pairs), "each pair once"
    return {(a, b): cosine for a, b, cosine in pairs}


def expected(values: np.ndarray, threshold: float) -> dict[tuple[int, int], float]:
    best = np.empty(len(values), np.float32)
    tiles = alike(values, threshold, best)
    return {(a, b): c for t in tiles for a, b, c in zip(*(x.tolist() for x in t[1:]), strict=True)}


@pytest.mark.parametrize("width", [2, 30, 48])
@pytest.mark.parametrize("threshold", [-1.0, 0.5, 0.9, 0.99])
def test_no_pair_is_missed_at_any_threshold(threshold: float, width: int) -> None:
    values = drawn(1000 if threshold > 0.5 else 300, width)
    pairs = found(values, threshold)
    truth = expected(values, threshold)
    sure = {pair for pair, cosine in truth.items() if cosine > threshold + 1e-6}
    assert sure <= pairs.keys()
    assert all(cosine >= threshold for cosine in pairs.values())
    for pair in pairs.keys() & truth.keys():
        assert pairs[pair] == pytest.approx(truth[pair], abs=1e-6)
    assert all(abs(truth.get(p, pairs.get(p, 0)) - threshold) < 1e-6 for p in pairs.keys() ^ truth.keys()), "rounding"
    assert len(truth) > 3


@pytest.mark.parametrize(("name", "size"), [("_SIDE", 7), ("_PENDING", 5), ("_READ", 11), ("_DENSE", 0)])
def test_block_sizes_do_not_change_the_pairs(monkeypatch: pytest.MonkeyPatch, name: str, size: int) -> None:
    values = drawn(600)
    before = found(values, 0.92)
    monkeypatch.setattr(module, name, size)
    assert found(Rows([values[:250], values[250:]]), 0.92).keys() == before.keys()
    assert len(before) > 50


def test_only_the_given_rows_are_compared() -> None:
    values = drawn(600)
    rows = np.random.default_rng(1).permutation(600)[:350]
    kept = set(rows.tolist())
    assert found(values, 0.92, np.sort(rows)).keys() == {p for p in expected(values, 0.92) if kept.issuperset(p)}


@pytest.mark.parametrize("count", [1, 2, 3, 45])
def test_few_features_need_no_cells(count: int) -> None:
    values = unit(np.ones((count, 4), np.float32) + 1e-3 * drawn(count, 4))
    assert len(found(values, 0.99)) == count * (count - 1) // 2


def test_zero_features_and_crowded_cells_are_no_exception() -> None:
    values = drawn(900)
    values[:200] = values[0] + 1e-3 * values[:200]  # a dense group in one cell
    values[450] = 0
    pairs = found(values, 0.95)
    assert len(pairs) >= 200 * 199 // 2
    assert pairs.keys() == expected(values, 0.95).keys()


def test_the_share_of_remaining_pairs_is_that_of_the_projection() -> None:
    values = drawn(1500)
    projection, rows = Projection.learn(values), np.arange(1500)
    assert projection.share(values, 0.99, rows) < 0.001
    assert projection.share(values, -1.0, rows) == 1
    points = projection(values, rows[:200]).astype(np.float64)
    units = unit(values[:200]).astype(np.float64)
    lower = ((points[:, None] - points) ** 2).sum(-1)
    assert (lower <= ((units[:, None] - units) ** 2).sum(-1) + 1e-6).all(), "a lower bound on every distance"


def test_a_high_threshold_takes_a_small_part_of_all_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count the products of 32 numbers, and the full cosines, instead of seconds."""
    values, counted = drawn(6000, 96), {"short": 0, "full": 0}
    multiply, verify = module._multiply, module._verify

    def count_short(x: np.ndarray, y: np.ndarray, reach: float):  # type: ignore[no-untyped-def]
        counted["short"] += len(x) * len(y)
        assert x.shape[1] == 32
        return multiply(x, y, reach)

    def count_full(values: np.ndarray, threshold: float, pairs: np.ndarray, done: int):  # type: ignore[no-untyped-def]
        counted["full"] += len(pairs)
        return verify(values, threshold, pairs, done)

    monkeypatch.setattr(module, "_multiply", count_short)
    monkeypatch.setattr(module, "_verify", count_full)
    pairs = found(values, 0.99)
    all_pairs = 6000 * 5999 // 2
    assert counted["short"] < 0.1 * all_pairs
    assert len(pairs) <= counted["full"] < 1e-4 * all_pairs
