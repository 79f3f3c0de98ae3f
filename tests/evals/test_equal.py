from __future__ import annotations

import numpy as np
import pytest

from dinocli.core.tensors import Rows
from dinocli.evals import equal as module
from dinocli.evals.equal import first_equal, first_nearly_equal, found_in


def drawn(count: int, width: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


@pytest.mark.parametrize("block", [4096, 3])
def test_rows_that_differ_in_one_bit_are_not_equal(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(module, "_BLOCK", block)
    values = drawn(20)
    values[[7, 19]] = values[3]
    values[12] = values[3]
    values[12, 5] = np.nextafter(values[3, 5], np.float32(9))
    values[5], values[6] = 0.0, -0.0
    expected = np.arange(20)
    expected[[7, 19]], expected[6] = 3, 5
    for given in (values, Rows([values[:9], values[9:]])):
        assert first_equal(given).tolist() == expected.tolist()
    others = np.concatenate([drawn(4, seed=1), values[[3, 12]]])
    rows = np.array([0, 3, 7, 12, 13])
    assert found_in(values, rows, others).tolist() == [False, True, True, True, False]
    assert not found_in(values, rows, others[:0]).any()


def test_rows_whose_hashes_collide_are_not_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_hash_rows", lambda read, rows: np.zeros(len(rows), np.int64))
    values = drawn(6)
    values[4] = values[0]
    assert first_equal(values).tolist() == [0, 1, 2, 3, 0, 5]
    assert found_in(values, np.array([0, 1]), values[:1]).tolist() == [True, False]


def test_rows_that_differ_by_rounding_are_nearly_equal() -> None:
    values = drawn(200, 64)
    values[100:] = values[:100] * (1 + 1e-7 * drawn(100, 64, seed=1)) * np.float32(3)  # and scaled by three
    first = first_nearly_equal(values)
    assert (first[:100] == np.arange(100)).all()
    assert np.mean(first[100:] == np.arange(100)) > 0.9, "in about one of thirty rows, a number rounds to another step"
    assert len(np.unique(first_nearly_equal(drawn(1000, 64)))) == 1000
