"""Rows of arrays in HDF5 and NPZ files, each an image."""

from __future__ import annotations

import io
import os
import zipfile
from functools import lru_cache
from importlib import import_module
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from dinocli.data.decode.raster import UnfitArray
from dinocli.data.images import megabytes_over

_UNPACKED = 2  # arrays of NPZ files that each process keeps


def count_rows(path: str, key: str) -> int:
    """Return the number of rows of an array, from its header.

    Raises:
        UnfitArray: If the file has no array of this name, or its rows cannot be images.
    """
    if path.lower().endswith(".npz"):
        with zipfile.ZipFile(path) as file:
            return _rows(_shape(file, key))
    with import_module("h5py").File(path, "r") as file:
        return _rows(_dataset(file, key).shape)


def read_row(path: str, key: str, row: int, most: float) -> bytes:
    """Return a row as the content of a `.npy` file.

    HDF5 unpacks the chunks of the row. A compressed NPZ is unpacked as a whole, once per process.

    Args:
        path: HDF5 or NPZ file.
        key: Name of the array.
        row: Index along the first axis, from 0.
        most: Largest accepted array of an NPZ, unpacked, in bytes.

    Raises:
        UnfitArray: If there is no array of this name or no row of this index, or the array is too large.
    """
    if path.lower().endswith(".npz"):
        values = _row(_unpack(path, key, os.stat(path).st_mtime_ns, most), row)
    else:
        with import_module("h5py").File(path, "r") as file:
            values = np.asarray(_row(_dataset(file, key), row))
    content = io.BytesIO()
    np.save(content, values, allow_pickle=False)
    return content.getvalue()


def _row(values: Any, row: int) -> NDArray[Any]:
    if row >= len(values):
        raise UnfitArray(f"no such row: {row}; the array has rows 0 to {len(values) - 1}")
    found: NDArray[Any] = values[row]
    return found


def _rows(shape: tuple[int, ...]) -> int:
    if len(shape) not in (3, 4):
        raise UnfitArray(f"no image: an array of {'x'.join(map(str, shape))}; expected [S, H, W] or [S, H, W, C]")
    return shape[0]


def _dataset(file: Any, key: str) -> Any:
    found = file.get(key)
    if found is None or not hasattr(found, "shape"):
        names: list[str] = []
        file.visititems(lambda name, one: names.append(name) if hasattr(one, "shape") else None)
        raise UnfitArray(f"no such array: {key!r}; the file has {', '.join(names[:8]) or 'none'} (images.key)")
    return found


def _shape(file: zipfile.ZipFile, key: str) -> tuple[int, ...]:
    if f"{key}.npy" not in file.namelist():
        names = ", ".join(name.removesuffix(".npy") for name in file.namelist()[:8])
        raise UnfitArray(f"no such array: {key!r}; the file has {names} (images.key)")
    with file.open(f"{key}.npy") as content:
        version = npy.read_magic(content)
        shape, *_ = npy.read_array_header_1_0(content) if version == (1, 0) else npy.read_array_header_2_0(content)
    return tuple(shape)


@lru_cache(_UNPACKED)
def _unpack(path: str, key: str, changed: int, most: float) -> NDArray[Any]:
    with zipfile.ZipFile(path) as file:
        _shape(file, key)
        if (size := file.getinfo(f"{key}.npy").file_size) > most:
            raise UnfitArray(f"too large: {megabytes_over(size, most / 1e6)}; write it as HDF5")
        with file.open(f"{key}.npy") as content:
            values: NDArray[Any] = npy.read_array(content, allow_pickle=False)
    return values
