from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dinocli.core import tensors as module
from dinocli.core.tensors import Rows, TensorStream, Texts, first_not_finite, map_tensors


def test_mapped_tensors_equal_the_file_and_are_memory_maps(tmp_path: Path) -> None:
    arrays = {
        "half": np.arange(6, dtype=np.float16).reshape(2, 3),
        "labels": np.array([-1, 5]),
        "bytes": np.arange(3, dtype=np.uint8),
        "nothing": np.empty((0, 4), np.float32),
    }
    save_file(arrays, tmp_path / "f.safetensors", {"a": "b"})
    tensors, metadata = map_tensors(tmp_path / "f.safetensors")
    assert metadata == {"a": "b"}
    for name, values in arrays.items():
        assert tensors[name].dtype == values.dtype
        np.testing.assert_array_equal(tensors[name], values)
    assert isinstance(tensors["half"], np.memmap)


def test_unsupported_types_and_truncated_files_are_refused(tmp_path: Path) -> None:
    save_file({"x": np.zeros(4)}, tmp_path / "f.safetensors")
    with pytest.raises(SafetensorError, match="F64"):
        map_tensors(tmp_path / "f.safetensors")
    (tmp_path / "f.safetensors").write_bytes((tmp_path / "f.safetensors").read_bytes()[:-1])
    with pytest.raises(SafetensorError):
        map_tensors(tmp_path / "f.safetensors")


@pytest.mark.parametrize("cuts", [[], [3], [1, 2, 9]])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_rows_of_several_arrays_are_indexed_like_one_array(cuts: list[int], dtype: type) -> None:
    values = np.random.default_rng(0).normal(size=(10, 4, 2)).astype(dtype)
    rows = Rows(np.split(values, cuts))
    assert (len(rows), rows.shape, rows.ndim) == (10, (10, 4, 2), 3)
    indices, inner = np.array([9, 0, 4, 4, -1]), np.array([3, 0, 1, 2, 3])
    for key in (slice(None), slice(2, 7), slice(0, 0), slice(8, 100), slice(0, 9, 2), indices, (indices, inner)):
        assert rows[key].dtype == np.float32
        np.testing.assert_array_equal(rows[key], values[key])
    np.testing.assert_array_equal(np.asarray(rows), values)
    with pytest.raises(IndexError):
        rows[np.array([10])]


def test_texts_are_split_at_zero_bytes() -> None:
    parts = [np.frombuffer(text.encode(), np.uint8) for text in ("a/ü.png\0b.png", "c.png")]
    assert list(Texts(parts)) == ["a/ü.png", "b.png", "c.png"]
    assert (len(Texts(parts)), Texts(parts)[1], Texts([])[:]) == (3, "b.png", [])


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_first_row_that_is_not_finite_is_found(monkeypatch: pytest.MonkeyPatch, dtype: type, bad: float) -> None:
    monkeypatch.setattr(module, "_CHECKED_BYTES", 100)
    values = np.full((50, 2, 3), np.finfo(dtype).max)  # whose sum is infinite
    values[::2] *= -1
    assert first_not_finite(values) is None
    assert first_not_finite(np.abs(values)) is None
    values[[31, 40]], values[17, 1, :2] = bad, (bad, -bad)
    assert first_not_finite(values) == (17, 2)
    assert first_not_finite(values[:0]) is None


@pytest.mark.parametrize("width", [1, 3, 4])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_streamed_tensors_are_aligned_and_read_by_safetensors(tmp_path: Path, width: int, dtype: str) -> None:
    values = np.arange(5 * width).reshape(5, width).astype(dtype)
    stream = TensorStream(tmp_path / "f", ("values", "labels", "text"), {"who": "ü" * 300})
    for i in range(5):
        stream.append("values", values[i : i + 1])
        stream.append("labels", np.array([i]))
    stream.append("text", np.frombuffer(b"some", np.uint8))
    stream.finish()
    stream.close()
    with safe_open(tmp_path / "f", framework="numpy") as file:
        np.testing.assert_array_equal(file.get_tensor("values"), values)
        assert file.get_tensor("values").dtype == dtype
        assert file.get_tensor("labels").tolist() == list(range(5))
        assert file.get_tensor("text").tobytes() == b"some"
        assert file.metadata() == {"who": "ü" * 300, "crc32": file.metadata()["crc32"]}
    assert map_tensors(tmp_path / "f")[1] == {"who": "ü" * 300}
    content = (tmp_path / "f").read_bytes()
    labels = content.index(np.arange(5).tobytes())
    assert labels % 8 == 0
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
