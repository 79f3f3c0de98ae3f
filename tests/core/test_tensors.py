from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from dinocli.core import tensors as module
from dinocli.core.tensors import (
    Rows,
    TensorStream,
    Texts,
    first_not_finite,
    load_tensors,
    map_tensors,
    read_metadata,
    write_tensors,
)


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


@pytest.mark.parametrize("header", [b"{", b"\xff\xff", b"[]", b'{"x": 1}'])
def test_a_corrupt_header_has_a_reason_in_plain_words(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "f.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    for read in (map_tensors, load_tensors):
        with pytest.raises(ValueError, match=r"^its header is not valid$"):
            read(path)


def test_other_numbers_and_damage_are_said(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    save_torch({"x": torch.zeros(4, dtype=torch.bfloat16)}, path)
    with pytest.raises(ValueError, match="x has the type BF16; expected one of F16, F32"):
        map_tensors(path)
    path.write_bytes(path.read_bytes()[:-1])
    for read in (map_tensors, load_tensors):
        with pytest.raises(ValueError, match="its size differs from the one in its header"):
            read(path)
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "nothing")


NUMBERS = ["float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "bool"]


def test_numbers_of_every_type_are_read_by_all_readers_and_by_the_library(tmp_path: Path) -> None:
    made = {name: np.arange(6).reshape(2, 3).astype(name) for name in NUMBERS}
    made["one"], made["turned"] = np.array(7.0, ">f4"), np.arange(6, dtype=np.float32).reshape(3, 2).T
    path = tmp_path / "f.safetensors"
    write_tensors(path, made, {"b": "ü", "a": "1"})
    mapped, loaded = map_tensors(path), load_tensors(path)
    assert mapped[1] == loaded[1] == read_metadata(path) == {"a": "1", "b": "ü"}
    with safe_open(path, framework="numpy") as file:
        for name, values in made.items():
            assert mapped[0][name].dtype == values.dtype.newbyteorder("=")
            assert loaded[0][name].dtype == getattr(torch, name, torch.float32)
            for read in (mapped[0][name], loaded[0][name].numpy(), file.get_tensor(name)):
                np.testing.assert_array_equal(read, values)


def test_the_bytes_of_a_file_are_fixed(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    write_tensors(path, {"b": np.array([1], np.uint8), "a": np.array([-1, 2])}, {"z": "ü", "y": "1"})
    header = '{"__metadata__":{"y":"1","z":"ü"},"a":{"dtype":"I64","shape":[2],"data_offsets":[0,16]},'
    header += '"b":{"dtype":"U8","shape":[1],"data_offsets":[16,17]}}'
    text = header.encode() + b" " * (-len(header.encode()) % 8)
    assert path.read_bytes() == len(text).to_bytes(8, "little") + text + b"\xff" * 8 + b"\2" + bytes(7) + b"\1"
    write_tensors(path, {"a": np.empty(0, np.float32)}, {})
    assert b"__metadata__" not in path.read_bytes()
    assert read_metadata(path) == {}


def test_metadata_are_read_without_the_tensors(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write_tensors(path, {"a": np.zeros(1000)}, {"dinocli": "features"})
    whole = path.read_bytes()
    path.write_bytes(whole[:-4000])
    assert read_metadata(path) == {"dinocli": "features"}
    nested = b"[" * 100_000
    corrupt = [
        b"",
        b"PK\3\4 and so on",
        whole[:40],
        b"\2" + bytes(7) + b"[]",
        len(nested).to_bytes(8, "little") + nested,
    ]
    for bad in (*corrupt, b"\x18" + bytes(7) + b'{"__metadata__": "no"}  '):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=r"not|Expecting|Extra|Unterminated|nested"):
            read_metadata(path)


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


def test_a_stream_continues_from_a_saved_state_to_the_same_bytes(tmp_path: Path) -> None:
    def write(folder: Path, rows: range, state: dict | None = None) -> TensorStream:
        folder.mkdir(exist_ok=True)
        stream = TensorStream(folder / "f", ("values", "text"), {"who": "x"}, state)
        for i in rows:
            stream.append("values", np.full((1, 3), i, np.float16))
            stream.append("text", np.frombuffer(b"row" * i, np.uint8))
        return stream

    whole = write(tmp_path / "whole", range(5))
    whole.finish()
    killed = write(tmp_path / "killed", range(3))
    state = json.loads(json.dumps(killed.save()))
    killed.append("values", np.ones((9, 3), np.float16))  # not saved
    killed.close()
    resumed = write(tmp_path / "killed", range(3, 5), state)
    resumed.finish()
    for stream in (whole, resumed):
        stream.close()
    assert (tmp_path / "killed" / "f").read_bytes() == (tmp_path / "whole" / "f").read_bytes()
    with pytest.raises(ValueError, match=r"f\.text is missing"):
        TensorStream(tmp_path / "killed" / "f", ("values", "text"), {"who": "x"}, state)
