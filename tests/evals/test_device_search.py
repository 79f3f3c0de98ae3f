from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dinocli.core.errors import DinoError
from dinocli.core.tensors import Rows
from dinocli.evals import device_search as module
from dinocli.evals.device_search import DeviceSearch
from dinocli.evals.knn import knn, predict_by_votes
from dinocli.evals.nearest import nearest
from dinocli.features.store import Features, Provenance, read_features
from dinocli.features.writer import write_features

CPU = torch.device("cpu")
PROVENANCE = Provenance("x", "0", "cls", 1, 224, "data")


def drawn(count: int, width: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


def with_exact_ties(count: int, seed: int) -> np.ndarray:
    """Return rows of eight directions, whose cosines have no rounding errors in any order of sums."""
    return np.random.default_rng(seed).choice([-0.5, 0.5], (count, 4)).astype(np.float32)


def by_definition(values: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return cosines in float64 and rows of the k nearest; equal ones in the order of rows."""
    a, b = (x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1)[:, None] for x in (queries, values))
    cosines = a @ b.T
    rows = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(cosines, rows, 1), rows


@pytest.fixture(params=[512 * 2**20, 4 * 16 * 130, 4 * 16 * 7], ids=["whole", "130 rows", "7 rows"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Set the bytes of a block: of 16 wide features, and of cosines."""
    monkeypatch.setattr(module, "_LEAST_BYTES", 1)
    monkeypatch.setattr(module, "_BLOCK_BYTES", request.param)
    return request.param


@pytest.mark.parametrize("k", [1, 4, 20, 300])
@pytest.mark.usefixtures("block")
def test_a_device_finds_the_neighbours_of_the_cpu_and_of_the_definition(k: int) -> None:
    values, queries = drawn(300), drawn(25, seed=1)
    cosines, rows = DeviceSearch(Rows([values[:20], values[20:]]), CPU).search(queries, k)
    assert (cosines.dtype, rows.dtype) == (np.float32, np.int64)
    true, expected = by_definition(values, queries, k)
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_allclose(cosines, true, atol=5e-7)
    theirs = nearest(values, queries, k)
    np.testing.assert_array_equal(rows, theirs[1])
    np.testing.assert_allclose(cosines, theirs[0], atol=5e-7)


@pytest.mark.parametrize("k", [1, 5, 30, 200])
@pytest.mark.usefixtures("block")
def test_of_equal_cosines_the_first_rows_are_kept_in_their_order(k: int) -> None:
    values, queries = with_exact_ties(200, 0), with_exact_ties(9, 1)
    cosines, rows = DeviceSearch(values, CPU).search(queries, k)
    true, expected = by_definition(values, queries, k)
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_array_equal(cosines, true)


@pytest.mark.usefixtures("block")
def test_copies_of_a_query_have_a_cosine_of_exactly_1() -> None:
    values = np.concatenate([drawn(60), drawn(60)])
    cosines, rows = DeviceSearch(values, CPU).search(values[:60], 3)
    assert (cosines[:, :2] == 1).all() and (cosines[:, 2] < 1).all()
    np.testing.assert_array_equal(rows[:, :2], np.arange(60)[:, None] + [0, 60])


@pytest.mark.parametrize("scale", [1e20, 1e-20])
def test_neighbours_on_a_device_do_not_depend_on_the_scale(scale: float) -> None:
    values = drawn(50)
    values[7] = 0  # a row without a direction has a cosine of 0
    cosines, rows = DeviceSearch(values, CPU).search(values[:5], 50)
    far, same = DeviceSearch((values * scale).astype(np.float32), CPU).search((values[:5] * scale), 50)
    np.testing.assert_array_equal(same, rows)
    np.testing.assert_allclose(far, cosines, atol=1e-6)
    assert (cosines[rows == 7] == 0).all()


def test_one_query_more_neighbours_than_features_and_no_query() -> None:
    values = drawn(5)
    search = DeviceSearch(values, CPU).search
    cosines, rows = search(values[2:3], 8)
    assert rows[0, 0] == 2 and cosines[0, 0] == 1
    assert sorted(rows[0, :5]) == list(range(5))
    assert (rows[0, 5:] == -1).all() and (cosines[0, 5:] == -np.inf).all()
    assert [part.shape for part in search(values[:0], 3)] == [(0, 3), (0, 3)]
    cosines, rows = DeviceSearch(values[:0], CPU).search(values, 2)
    assert (rows == -1).all() and (cosines == -np.inf).all()


@pytest.mark.parametrize("queries", [drawn(3, 15), drawn(16)[0]], ids=["narrower", "a vector"])
def test_queries_of_another_shape_are_an_error(queries: np.ndarray) -> None:
    with pytest.raises(DinoError, match=r"the queries have the shape \[.*\]; expected \[Q, 16\]"):
        DeviceSearch(drawn(20), CPU).search(queries, 2)


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.usefixtures("block")
def test_votes_of_neighbours_from_a_device_are_those_of_the_cpu(alone: bool) -> None:
    def features(count: int, seed: int) -> Features:
        labels = np.random.default_rng(seed).integers(0, 4, count)
        values = np.eye(4, dtype=np.float32)[labels].repeat(4, axis=1) + drawn(count, seed=seed)
        return Features(values, labels, [""] * count, list("abcd"), {}, PROVENANCE)

    train, test = features(150, 0), None if alone else features(40, 1)
    search = DeviceSearch(train.values, CPU).search
    assert knn(train, test, [1, 20], search=search) == knn(train, test, [1, 20])
    (k, _, found), (same, _, theirs) = (predict_by_votes(train, test, [1, 20], search=s) for s in (search, None))
    assert k == same
    np.testing.assert_array_equal(found.predicted, theirs.predicted)
    np.testing.assert_allclose(found.confidence, theirs.confidence, rtol=1e-4)


class Read:
    """Features that record how many rows each read loads."""

    def __init__(self, values: np.ndarray) -> None:
        self._values, self.reads, self.shape = values, list[int](), values.shape

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, key: slice | np.ndarray) -> np.ndarray:
        if isinstance(key, slice):  # others are of the neighbours that may equal a query
            self.reads.append(len(self._values[key]))
        return self._values[key]


@pytest.mark.parametrize(("free", "reads"), [(10 * 2**20, 1), (2**20, 2)], ids=["fit", "do not fit"])
def test_features_are_read_once_if_they_fit_and_else_in_blocks_for_each_search(
    monkeypatch: pytest.MonkeyPatch, free: int, reads: int
) -> None:
    monkeypatch.setattr(module, "_LEAST_BYTES", 1)
    monkeypatch.setattr(module, "memory_of", lambda device: (free, free))
    values, queries = Read(drawn(10_000)), drawn(70, seed=1)  # 640 kB
    search = DeviceSearch(values, CPU)
    found = [search.search(queries, 5) for _ in range(2)]
    np.testing.assert_array_equal(found[0][1], found[1][1])
    np.testing.assert_array_equal(found[0][1], by_definition(values[:], queries, 5)[1])
    values.reads.pop()  # of the definition
    assert max(values.reads) * 16 * 4 <= free // 32
    assert sum(values.reads) == reads * 10_000
    assert len(values.reads) == reads * -(-10_000 * 64 // (free // 32))


def test_features_in_mapped_files_are_searched_without_a_warning(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    values = drawn(30)
    with write_features(tmp_path / "f.safetensors", PROVENANCE, ["a"]) as writer:
        writer.append(values, [0] * 30, [""] * 30)
    _, rows = DeviceSearch(read_features(writer.place).values, CPU).search(values, 1)
    np.testing.assert_array_equal(rows[:, 0], np.arange(30))
    assert not list(recwarn)


def limit(monkeypatch: pytest.MonkeyPatch, cells: int) -> list[int]:
    """Let memory run out above a number of cosines; return the list of tried numbers."""
    tried: list[int] = []
    original = module._largest

    def limited(cosines: Tensor, k: int) -> tuple[Tensor, Tensor]:
        tried.append(cosines.numel())
        if cosines.numel() > cells:
            raise torch.OutOfMemoryError
        return original(cosines, k)

    monkeypatch.setattr(module, "_largest", limited)
    return tried


def test_if_memory_runs_out_the_search_uses_smaller_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LEAST_BYTES", 1)
    monkeypatch.setattr(module, "_BLOCK_BYTES", 2**16)
    values, queries = Read(drawn(3000)), drawn(70, seed=1)
    expected = nearest(values[:], queries, 7)[1]
    values.reads.clear()
    tried = limit(monkeypatch, 5000)
    search = DeviceSearch(values, CPU)
    np.testing.assert_array_equal(search.search(queries, 7)[1], expected)
    assert sum(cells > 5000 for cells in tried) == 2, "16384 and 8192 cosines did not fit"
    assert max(values.reads) == 1024 and values.reads[-1] < 256, "the blocks of features are halved too"
    values.reads.clear()
    np.testing.assert_array_equal(search.search(queries, 7)[1], expected)
    assert sum(cells > 5000 for cells in tried) == 2, "further searches use the smaller blocks"
    assert sum(values.reads) == 3000, "and keep no features on the device"


def test_too_little_memory_for_the_smallest_block_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, 0)
    monkeypatch.setattr(module, "memory_of", lambda device: (3_000_000, 80_000_000_000))
    with pytest.raises(DinoError) as error:
        DeviceSearch(drawn(30), CPU).search(drawn(4), 2)
    assert error.value.message == (
        "the memory of cpu is too small for 4 queries with 2 neighbours: 3 MB of 80.0 GB are free"
    )
    assert error.value.hint == "use --device cpu"


def test_products_are_exact_during_a_search_and_as_before_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, bool]] = []
    original = module._largest

    def watched(cosines: Tensor, k: int) -> tuple[Tensor, Tensor]:
        seen.append((torch.get_float32_matmul_precision(), cosines.dtype == torch.float32))
        return original(cosines, k)

    monkeypatch.setattr(module, "_largest", watched)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            DeviceSearch(drawn(30), CPU).search(drawn(4), 2)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(seen) == {("highest", True)}


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [100_000, 1000])
def test_a_gpu_finds_the_neighbours_of_the_cpu(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(module, "_BLOCK_BYTES", rows * 4 * 64)
    values, queries = drawn(10_000, 64), drawn(64, 64, seed=1)
    values[5000:5064] = queries
    true, expected = by_definition(values, queries, 2000)
    search = DeviceSearch(values, torch.device("cuda"))
    for k in (1, 20, 2000):
        cosines, found = search.search(queries, k)
        np.testing.assert_allclose(cosines, true[:, :k], atol=5e-7)
        named = np.einsum("qd,qkd->qk", *(unit64(x) for x in (queries, values[found])))
        np.testing.assert_allclose(named, true[:, :k], atol=5e-7)  # neighbours within rounding errors may swap places
        assert (found == expected[:, :k]).mean() > 0.99
        assert (cosines[:, 0] == 1).all()
    tied, asked = with_exact_ties(10_000, 0), with_exact_ties(20, 1)
    cosines, found = DeviceSearch(tied, torch.device("cuda")).search(asked, 100)
    true, expected = by_definition(tied, asked, 100)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(cosines, true)


def unit64(values: np.ndarray) -> np.ndarray:
    wide = values.astype(np.float64)
    return wide / np.linalg.norm(wide, axis=-1, keepdims=True)


@pytest.mark.gpu
def test_a_search_uses_a_bounded_part_of_a_gpus_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, free = torch.device("cuda"), 256 * 2**20
    monkeypatch.setattr(module, "memory_of", lambda device: (free, free))
    values = with_exact_ties(2_000_000, 0)  # 32 MB, kept there; equal cosines need the most memory
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    DeviceSearch(values, cuda).search(values[:1000], 20)
    assert torch.cuda.max_memory_allocated() - before < free
