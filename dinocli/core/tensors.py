"""Tensors on disk: safetensors files written whole or row by row, read through memory maps, and their fingerprints."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, overload

import numpy as np
from numpy.typing import DTypeLike, NDArray
from safetensors import SafetensorError, safe_open

from dinocli.core.atomic import atomic
from dinocli.core.checksums import KEY, crc_of, verified

if TYPE_CHECKING:
    from torch import Tensor

# Names of types in the format, by numpy's name and the other way round.
_FORMAT_DTYPES = {"float32": "F32", "float16": "F16", "int64": "I64", "uint8": "U8"}
_DTYPES = {"F32": "<f4", "F16": "<f2", "I64": "<i8", "U8": "u1"}
_HEADER_BYTES = 256  # most bytes per tensor in the header
_ALIGNMENT = 8  # bytes
_CHECKED_BYTES = 4 * 2**20  # a block that fits into the processor's cache
Indices = NDArray[np.int64]


def map_tensors(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Return the memory-mapped tensors of a safetensors file, and its metadata.

    If the file has a checksum, it is verified first, which reads the whole file; a large file only the first time.

    Raises:
        SafetensorError: If the file is corrupt or of another kind, or holds types other than float32, float16, int64
            and uint8.
    """
    with safe_open(path, framework="numpy") as file:  # checks that header and length agree
        metadata = file.metadata() or {}
    with path.open("rb") as opened:
        header_size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(header_size))
    known = metadata.pop(KEY, None)
    if known is not None:
        header["__metadata__"] = metadata
        if not verified(path, known, 8 + header_size, header):
            raise SafetensorError("its checksum does not match")
    tensors: dict[str, NDArray[Any]] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _DTYPES:
            raise SafetensorError(f"{name} has the type {entry['dtype']}; expected one of {', '.join(_DTYPES)}")
        dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        offset = 8 + header_size + begin
        # Empty tensors cannot be mapped.
        tensors[name] = np.memmap(path, dtype, "r", offset, shape) if end > begin else np.empty(shape, dtype)
    return tensors, metadata


def first_not_finite(values: NDArray[Any]) -> tuple[int, int] | None:
    """Return the first row with infinite or NaN values, and how many it has; None if there is no such row.

    Args:
        values: [S, ...], float32 or float16
    """
    width = values.itemsize * max(1, int(np.prod(values.shape[1:])))
    step = max(1, _CHECKED_BYTES // width)
    for first in range(0, len(values), step):
        block = np.asarray(values[first : first + step])
        if not _is_finite(block):
            bad = ~np.isfinite(block).reshape(len(block), -1)
            row = int(bad.any(1).argmax())
            return first + row, int(bad[row].sum())
    return None


def _is_finite(block: NDArray[Any]) -> bool:
    # A sum takes a third of the time of a mask. If it is finite, all values are; if not, it may only have overflowed.
    if block.dtype == np.float16:
        exponents = np.ascontiguousarray(block).view(np.uint16) & np.uint16(0x7C00)
        return bool(exponents.max(initial=0) < 0x7C00)
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(block.sum()) or np.isfinite(block).all())


class Rows:
    """Rows of S images from consecutive arrays, on disk or in memory, returned as float32.

    Index it like an array: by a slice, or by an array of row indices and optionally one of indices within the rows.
    Only the rows of the result are loaded into memory.

    Args:
        parts: Arrays of [s, ...], at least one. Their sizes may differ only in the first dimension.

    Attributes:
        shape: Shape of all rows together. [S, ...]
    """

    def __init__(self, parts: Sequence[NDArray[Any] | Rows]) -> None:
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])
        self.shape: tuple[int, ...] = (int(self._ends[-1]), *parts[0].shape[1:])

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: slice | Indices | tuple[Indices, ...]) -> NDArray[np.float32]:
        if isinstance(key, slice):
            first, last, step = key.indices(len(self))
            if len(self._parts) == 1:
                return np.asarray(self._parts[0][key], np.float32)
            if step == 1 and first < last:  # one large read per part
                begins = [int(end) - len(part) for end, part in zip(self._ends, self._parts, strict=True)]
                cuts = [(max(0, first - b), min(len(p), last - b)) for b, p in zip(begins, self._parts, strict=True)]
                pieces = [np.asarray(p[a:b], np.float32) for p, (a, b) in zip(self._parts, cuts, strict=True) if a < b]
                return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
            key = np.arange(first, last, step)
        rows, *rest = key if isinstance(key, tuple) else (key,)
        rows = np.where(rows < 0, rows + len(self), rows)
        result = np.empty((len(rows), *self.shape[1 + len(rest) :]), np.float32)
        part = np.searchsorted(self._ends, rows, side="right")  # index of each row's part
        for i in np.unique(part):
            selected = part == i
            within = rows[selected] - (self._ends[i] - len(self._parts[i]))
            result[selected] = self._parts[i][(within, *(indices[selected] for indices in rest))]
        return result

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self[:], dtype)


class Texts(Sequence[str]):
    """Texts stored as UTF-8 bytes with a zero byte between them, decoded on first access.

    Args:
        parts: Arrays of uint8; an empty array is one empty text.
    """

    def __init__(self, parts: Sequence[NDArray[np.uint8]]) -> None:
        self._parts = parts
        self._decoded: list[str] | None = None

    def _decode(self) -> list[str]:
        if self._decoded is None:
            joined = (part.tobytes().decode("utf-8", "surrogateescape") for part in self._parts)
            self._decoded = [text for texts in joined for text in texts.split("\0")]
        return self._decoded

    def __len__(self) -> int:
        return len(self._decode())

    @overload
    def __getitem__(self, key: int) -> str: ...
    @overload
    def __getitem__(self, key: slice) -> Sequence[str]: ...
    def __getitem__(self, key: int | slice) -> str | Sequence[str]:
        return self._decode()[key]


Values = NDArray[np.float32] | Rows  # in memory or on disk; rows are indexed in the same way


class TensorStream:
    """Writer of tensors row by row; the file is complete once `finish` has returned.

    Rows of the first tensor are written in place. Rows of the others go to unnamed temporary files next to it, which
    vanish with the process, and are appended at the end. The metadata gets a checksum of all tensors and the header,
    which `map_tensors` verifies.

    Args:
        path: Path of the file; use a draft, because the file is incomplete until `finish`.
        names: Names of the tensors.
        metadata: Metadata of the file.
    """

    def __init__(self, path: Path, names: Sequence[str], metadata: dict[str, str]) -> None:
        self._metadata = metadata
        # The header comes first and states every tensor's shape, but shapes are known only at the end. So space is
        # reserved for it, and later padded with blanks, as the format allows.
        self._header_size = len(json.dumps({"__metadata__": metadata})) + _HEADER_BYTES * (2 * len(names) + 1)
        self._header_size += -self._header_size % _ALIGNMENT
        self._file = path.open("wb")
        self._file.write(b" " * (8 + self._header_size))
        self._files: dict[str, BinaryIO] = {names[0]: self._file}
        for name in names[1:]:
            self._files[name] = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115, closed by `close`
        self._entries: dict[str, dict[str, Any]] = {}  # types and shapes for the header
        self._crc = 0  # of the tensor data in the final file so far

    def append(self, name: str, rows: NDArray[Any]) -> None:
        """Add rows of the same type and size as the earlier ones. [B, ...]"""
        count = self._entries.get(name, {"shape": [0]})["shape"][0]
        self._entries[name] = {"dtype": _FORMAT_DTYPES[rows.dtype.name], "shape": [count + len(rows), *rows.shape[1:]]}
        contiguous = np.ascontiguousarray(rows, rows.dtype.newbyteorder("<"))
        self._files[name].write(contiguous.data)
        if self._files[name] is self._file and contiguous.size:
            self._crc = zlib.crc32(contiguous.data.cast("B"), self._crc)

    def finish(self) -> None:
        """Append the other tensors, write the header, and sync the file to disk."""
        header: dict[str, Any] = {"__metadata__": self._metadata}
        end = 0
        for name, file in self._files.items():
            begin, end = end, end + file.tell() - (8 + self._header_size if file is self._file else 0)
            if file is not self._file:
                file.seek(0)
                while piece := file.read(1 << 20):
                    self._put(piece)
            header[name] = self._entries[name] | {"data_offsets": [begin, end]}
            if gap := -end % _ALIGNMENT:  # the next tensor may be int64; gaps are not allowed, so name the padding
                self._put(b"\0" * gap)
                header[f"padding of {name}"] = {"dtype": "U8", "shape": [gap], "data_offsets": [end, end + gap]}
                end += gap
        header["__metadata__"] = self._metadata | {KEY: f"{crc_of(header, self._crc):08x}"}
        self._file.seek(0)
        self._file.write(self._header_size.to_bytes(8, "little") + json.dumps(header).encode().ljust(self._header_size))
        self._file.flush()
        os.fsync(self._file.fileno())

    def _put(self, piece: bytes) -> None:
        self._file.write(piece)
        self._crc = zlib.crc32(piece, self._crc)

    def close(self) -> None:
        """Close the files, complete or not."""
        for file in self._files.values():
            file.close()


def write_tensors(path: Path, tensors: dict[str, NDArray[Any]], metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically; the same tensors and metadata give the same bytes.

    Raises:
        OSError: If the disk is full or the place is not writable.

    Source: the format, https://github.com/huggingface/safetensors: length of the header, header, tensor data.
    """
    # The safetensors library orders metadata differently each time, so it cannot write the same bytes twice.
    ordered = {name: np.asarray(values, order="C") for name, values in tensors.items()}
    ordered = {name: values.astype(values.dtype.newbyteorder("<"), copy=False) for name, values in ordered.items()}
    # Wide types first, so that every tensor starts at a multiple of its item size.
    names = sorted(ordered, key=lambda name: (-ordered[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name in names:
        values, begin = ordered[name], end
        end += values.nbytes
        header[name] = {"dtype": _name_dtype(values), "shape": values.shape, "data_offsets": (begin, end)}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic(path) as draft, draft.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(ordered[name].data)


def _name_dtype(values: NDArray[Any]) -> str:
    """Return the format's name of an array's type, such as F32, I64, U8 or BOOL."""
    letters = {"f": "F", "i": "I", "u": "U"}
    return "BOOL" if values.dtype.kind == "b" else f"{letters[values.dtype.kind]}{8 * values.itemsize}"


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Return a digest of weights, as sixteen hexadecimal digits."""
    import torch  # only here: features are read and compared without torch

    digest = hashlib.sha256()
    for key in sorted(weights):
        digest.update(key.encode())
        digest.update(weights[key].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
