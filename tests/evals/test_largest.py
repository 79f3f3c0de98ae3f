from __future__ import annotations

import numpy as np
import pytest
import torch

from dinocli.evals import largest as module
from dinocli.evals.largest import LargestCosines, Rounded
from dinocli.evals.units import unit

Numbers = np.ndarray


def drawn(count: int, width: int, seed: int = 0) -> Numbers:
    return unit(np.random.default_rng(seed).normal(size=(count, width)))


def collect(queries: Numbers, rows: Numbers, k: int, *, rounded: bool, block: int = 10**9) -> LargestCosines:
    largest = LargestCosines(queries, k, rounded=rounded)
    for first in range(0, len(rows), block):
        some = rows[first : first + block]
        largest.add(some, np.arange(first, first + len(some)))
    return largest


def check(largest: LargestCosines, queries: Numbers, rows: Numbers, k: int) -> None:
    """Compare with products in float64; rows within the rounding errors of float32 may swap places."""
    true = queries.astype(np.float64) @ rows.T.astype(np.float64)
    best = -np.sort(-true, 1)[:, :k]
    np.testing.assert_allclose(largest.cosines, best, atol=5e-7)
    np.testing.assert_allclose(np.take_along_axis(true, largest.rows, 1), best, atol=5e-7)
    assert all(len(set(found)) == k for found in largest.rows.tolist())
    assert (np.diff(largest.cosines) <= 0).all()


@pytest.fixture
def no_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a block was searched in float32")

    monkeypatch.setattr(module.faiss, "knn", fail)


@pytest.mark.parametrize("block", [10**9, 1100, 999])
@pytest.mark.parametrize("k", [1, 7, 15])
def test_float32_finds_the_largest(block: int, k: int) -> None:
    queries, rows = drawn(70, 16, 1), drawn(3000, 16)
    check(collect(queries, rows, k, rounded=False, block=block), queries, rows, k)


@pytest.mark.parametrize("block", [10**9, 1100])
@pytest.mark.parametrize("k", [1, 5, 9])
@pytest.mark.parametrize("cosine_bytes", [128 * 2**20, 4 * 1000 * 30])
@pytest.mark.usefixtures("no_float32")
def test_bfloat16_finds_those_of_float32(
    monkeypatch: pytest.MonkeyPatch, block: int, k: int, cosine_bytes: int
) -> None:
    monkeypatch.setattr(module, "_COSINE_BYTES", cosine_bytes)
    queries, rows = drawn(70, 16, 1), drawn(3000, 16)
    check(collect(queries, rows, k, rounded=True, block=block), queries, rows, k)


def beside(axis: Numbers, cosines: Numbers) -> Numbers:
    """Return unit vectors with given cosines to an axis. [S]"""
    noise = np.random.default_rng(2).normal(size=(len(cosines), len(axis)))
    noise -= noise @ axis[:, None] * axis
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    return unit(cosines[:, None] * axis + np.sqrt(1 - cosines[:, None] ** 2) * noise)


@pytest.mark.usefixtures("no_float32")
def test_neighbours_closer_than_bfloat16_resolves_come_in_the_order_of_float32() -> None:
    """Place forty rows at cosines 1e-5 apart, where bfloat16 has steps of 4e-3; the ten best are found, in order."""
    rows, queries = drawn(4000, 64), drawn(64, 64, 1)
    places = np.random.default_rng(0).permutation(4000)[:40]
    rows[places] = beside(queries[0].astype(np.float64), 0.9 + 1e-5 * np.arange(40))
    largest = collect(queries, rows, 10, rounded=True)
    assert largest.rows[0].tolist() == places[:-11:-1].tolist()
    check(largest, queries, rows, 10)
    rough = torch.from_numpy(queries[:1]).bfloat16() @ torch.from_numpy(rows).bfloat16().T
    assert set(rough.topk(10).indices[0].tolist()) != set(largest.rows[0].tolist()), "else the test proves nothing"


def test_rows_too_close_for_bfloat16_are_searched_in_float32() -> None:
    axis = np.eye(64)[0]
    rows, queries = beside(axis, np.linspace(0.9999, 0.99999, 3000)), drawn(70, 64, 1)
    queries[:] = unit(axis + 0.1 * queries)
    largest = collect(queries, rows, 5, rounded=True, block=1000)
    assert largest._rounded is None, "the later blocks are not tried in bfloat16"
    check(largest, queries, rows, 5)
    plain = collect(queries, rows, 5, rounded=False, block=1000)
    assert (largest.rows == plain.rows).all() and (largest.cosines == plain.cosines).all()


def test_the_first_close_block_of_queries_ends_bfloat16_for_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_COSINE_BYTES", 4 * 3000 * 32)
    axis = np.eye(64)[0]
    rows = np.concatenate([drawn(2000, 64), beside(axis, np.linspace(0.9999, 0.99999, 1000))])
    queries = drawn(96, 64, 1)
    queries[32:64] = unit(axis + 0.1 * queries[32:64])
    largest = collect(queries, rows, 5, rounded=True)
    assert largest._rounded is None
    check(largest, queries, rows, 5)


@pytest.mark.parametrize("rounded", [True, False])
def test_equal_rows_and_zero_rows_are_found(rounded: bool) -> None:
    queries, rows = np.repeat(drawn(1, 8), 70, 0), np.repeat(drawn(1, 8), 2000, 0)
    queries[-1] = 0
    rows[::2] = 0
    largest = collect(queries, rows, 6, rounded=rounded, block=700)
    np.testing.assert_allclose(largest.cosines[:-1], 1, atol=1e-6)
    assert (largest.rows[:-1] % 2 == 1).all()
    assert (largest.cosines[-1] == 0).all()
    assert all(len(set(found)) == 6 for found in largest.rows.tolist())


def test_fewer_rows_than_k_leave_places_empty() -> None:
    queries, rows = drawn(3, 8, 1), drawn(4, 8)
    largest = collect(queries, rows, 6, rounded=False, block=3)
    check_part = -np.sort(-(queries @ rows.T), 1)
    np.testing.assert_allclose(largest.cosines[:, :4], check_part, atol=1e-6)
    assert (largest.rows[:, 4:] == -1).all() and np.isneginf(largest.cosines[:, 4:]).all()


def measured_error(queries: Numbers, rows: Numbers) -> Numbers:
    ours, theirs = (Rounded.of(some).values.double().numpy() for some in (queries, rows))
    return np.abs(queries.astype(np.float64) @ rows.T.astype(np.float64) - ours @ theirs.T).max(1)


@pytest.mark.parametrize("width", [1, 3, 64, 768])
def test_no_error_exceeds_the_bound(width: int) -> None:
    queries, rows = drawn(200, width, 1), drawn(2000, width)
    bound = Rounded.of(queries).error(Rounded.of(rows))
    assert (measured_error(queries, rows) <= bound).all()
    assert (bound < 2 * 2**-8 + 2 * width * 2**-22).all(), "no worse than the worst case of both operands"


def test_the_bound_is_reached_by_the_worst_rounding() -> None:
    """Use numbers halfway between two of bfloat16, which all round down."""
    worst = np.full((1, 63), 0.125 * (1 + 2**-8), np.float32)
    assert Rounded.of(worst).values.float().eq(0.125).all()
    bound = Rounded.of(worst).error(Rounded.of(worst))
    assert 0.97 * bound < measured_error(worst, worst) <= bound


def test_the_lowest_rounded_cosine_covers_the_rounding_of_the_result() -> None:
    """Round every true cosine in the worst way; none that reaches the threshold is lost."""
    true = np.linspace(-1, 1, 20001)
    rounded = torch.from_numpy(true).to(torch.bfloat16).double().numpy()
    for error in (0.0, 0.004):
        for least in np.linspace(-0.99, 0.99, 67):
            lowest = module._lowest_rounded(np.array([least], np.float32), np.array([error]))[0]
            can_reach = true + error >= np.float32(least)
            assert (rounded[can_reach] >= lowest).all()
            assert (rounded[true + error < least - 2.5 * 2**-8] < lowest).all(), "the threshold excludes something"
