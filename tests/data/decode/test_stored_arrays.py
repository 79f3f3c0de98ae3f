"""Rows of HDF5 and NPZ arrays."""

from __future__ import annotations

import importlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dinocli.data.decode.raster import UnfitArray
from dinocli.data.decode.stored_arrays import count_rows, read_row

VALUES = np.random.default_rng(0).integers(0, 65000, (5, 8, 9), dtype=np.uint16)


def stored(folder: Path, kind: str) -> str:
    path = folder / f"a.{kind.rpartition('-')[2]}"
    if kind == "npz":
        np.savez(path, images=VALUES, labels=np.arange(5))
    elif kind == "packed-npz":
        np.savez_compressed(path, images=VALUES, labels=np.arange(5))
    else:
        h5py: Any = pytest.importorskip("h5py")
        with h5py.File(path, "w") as file:
            file.create_dataset("images", data=VALUES, chunks=(2, 8, 9), compression="gzip")
            file["labels"] = np.arange(5)
    return str(path)


@pytest.mark.parametrize("kind", ["npz", "packed-npz", "h5"])
def test_a_row_has_the_values_that_were_stored(tmp_path: Path, kind: str) -> None:
    path = stored(tmp_path, kind)
    assert count_rows(path, "images") == 5
    for row in (4, 0, 3):
        np.testing.assert_array_equal(np.load(io.BytesIO(read_row(path, "images", row, 1e6))), VALUES[row])
    with pytest.raises(UnfitArray, match="no such row: 5; the array has rows 0 to 4"):
        read_row(path, "images", 5, 1e6)
    with pytest.raises(UnfitArray, match="no such array: 'x'; the file has images, labels"):
        count_rows(path, "x")
    with pytest.raises(UnfitArray, match=r"no image: an array of 5; expected \[S, H, W\]"):
        count_rows(path, "labels")


def test_a_row_of_hdf5_is_read_from_its_own_chunk_alone(tmp_path: Path) -> None:
    """h5py reads a list of rows 13 times slower than one after the other; here other chunks are not even readable."""
    path = stored(tmp_path, "h5")
    with importlib.import_module("h5py").File(path, "r") as file:
        place = file["images"].id.get_chunk_info_by_coord((2, 0, 0))  # of rows 2 and 3
    data = bytearray(Path(path).read_bytes())
    data[place.byte_offset : place.byte_offset + place.size] = bytes(place.size)
    Path(path).write_bytes(data)
    for row in (0, 1, 4):
        np.testing.assert_array_equal(np.load(io.BytesIO(read_row(path, "images", row, 1e6))), VALUES[row])
    with pytest.raises(OSError):
        read_row(path, "images", 3, 1e6)


def test_an_npz_over_the_limit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnfitArray, match=r"too large: .* megabytes, over 0\.0001; write it as HDF5"):
        read_row(stored(tmp_path, "packed-npz"), "images", 0, 100)


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "o.npz", images=np.full((2, 3, 4), {}, dtype=object))
    with pytest.raises(ValueError, match="allow_pickle"):
        read_row(str(tmp_path / "o.npz"), "images", 0, 1e6)
