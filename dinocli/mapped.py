"""Tensors where they lie: files mapped into memory, and the rows of several as one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import DTypeLike, NDArray
from safetensors import SafetensorError, safe_open

from dinocli.checksums import KEY, verified

_DTYPES = {"F32": "<f4", "F16": "<f2", "I64": "<i8", "U8": "u1"}
Indices = NDArray[np.int64]


def map_tensors(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """The tensors of a safetensors file, of which nothing is read before it is asked for; and the file's metadata.

    A file that carries a checksum is verified first, which reads it; a large one is read once only.

    Raises:
        SafetensorError: The file is damaged or of another kind, or holds other numbers than float32, float16, int64
            and uint8.
    """
    with safe_open(path, framework="numpy") as file:  # which looks whether header and length fit together
        metadata = file.metadata() or {}
    with path.open("rb") as opened:
        room = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(room))
    known = metadata.pop(KEY, None)
    if known is not None:
        header["__metadata__"] = metadata
        if not verified(path, known, 8 + room, header):
            raise SafetensorError("its checksum does not match")
    tensors: dict[str, NDArray[Any]] = {}
    for name, told in header.items():
        if name == "__metadata__":
            continue
        if told["dtype"] not in _DTYPES:
            raise SafetensorError(f"{name} is of the type {told['dtype']}")
        dtype, shape = _DTYPES[told["dtype"]], tuple(told["shape"])
        begin, end = told["data_offsets"]
        # Nothing cannot be mapped.
        tensors[name] = np.memmap(path, dtype, "r", 8 + room + begin, shape) if end > begin else np.empty(shape, dtype)
    return tensors, metadata


class Rows:
    """Numbers of S images that lie in one array after another, on disk or not; what is taken of them is float32.

    It is asked as an array is: by a slice, or by an array of numbers of rows and perhaps one more of places within
    them. Nothing else is held in memory.

    Args:
        parts: At least one. [s, ...] each, with the same numbers of dimensions and sizes but for the first

    Attributes:
        shape: [S, ...]
    """

    def __init__(self, parts: Sequence[NDArray[Any] | Rows]) -> None:
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])
        self.shape: tuple[int, ...] = (int(self._ends[-1]), *parts[0].shape[1:])

    @property
    def ndim(self) -> int:
        """How many dimensions."""
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: slice | Indices | tuple[Indices, ...]) -> NDArray[np.float32]:
        if isinstance(key, slice):
            first, last, step = key.indices(len(self))
            if len(self._parts) == 1:
                return np.asarray(self._parts[0][key], np.float32)
            if step == 1 and first < last:  # in large pieces, of which each lies in one part
                begins = [int(end) - len(part) for end, part in zip(self._ends, self._parts, strict=True)]
                cut = [(max(0, first - b), min(len(p), last - b)) for b, p in zip(begins, self._parts, strict=True)]
                pieces = [np.asarray(p[a:b], np.float32) for p, (a, b) in zip(self._parts, cut, strict=True) if a < b]
                return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
            key = np.arange(first, last, step)
        rows, *rest = key if isinstance(key, tuple) else (key,)
        rows = np.where(rows < 0, rows + len(self), rows)
        found = np.empty((len(rows), *self.shape[1 + len(rest) :]), np.float32)
        part = np.searchsorted(self._ends, rows, side="right")
        for i in np.unique(part):
            mine = part == i
            within = rows[mine] - (self._ends[i] - len(self._parts[i]))
            found[mine] = self._parts[i][(within, *(places[mine] for places in rest))]
        return found

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self[:], dtype)


class Texts(Sequence[str]):
    """Texts that lie as bytes with zeros between them; they are made when the first is asked for.

    Args:
        parts: uint8; one without bytes is one empty text.
    """

    def __init__(self, parts: Sequence[NDArray[np.uint8]]) -> None:
        self._parts = parts
        self._made: list[str] | None = None

    def _texts(self) -> list[str]:
        if self._made is None:
            texts = (part.tobytes().decode("utf-8", "surrogateescape") for part in self._parts)
            self._made = [text for some in texts for text in some.split("\0")]
        return self._made

    def __len__(self) -> int:
        return len(self._texts())

    @overload
    def __getitem__(self, key: int) -> str: ...
    @overload
    def __getitem__(self, key: slice) -> Sequence[str]: ...
    def __getitem__(self, key: int | slice) -> str | Sequence[str]:
        return self._texts()[key]


Values = NDArray[np.float32] | Rows  # what is asked for rows in the same way, in memory or not
