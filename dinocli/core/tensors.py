"""Tensors on disk: safetensors files, loaded, mapped, and written at once or row by row; fingerprints of weights."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, overload

import numpy as np
from numpy.typing import DTypeLike, NDArray
from safetensors import SafetensorError, safe_open

from dinocli.core.atomic import atomic
from dinocli.core.checksums import KEY, crc_of, crc_of_file, parse, verified

if TYPE_CHECKING:
    from torch import Tensor

# The format's types that numpy has; those with one byte have no byte order.
_DTYPES = {
    **{f"F{8 * size}": f"<f{size}" for size in (2, 4, 8)},
    **{f"I{8 * size}": f"<i{size}" for size in (2, 4, 8)},
    **{f"U{8 * size}": f"<u{size}" for size in (2, 4, 8)},
    "I8": "|i1",
    "U8": "|u1",
    "BOOL": "|b1",
}
_KINDS = {dtype: kind for kind, dtype in _DTYPES.items()}
_METADATA = "__metadata__"
_HEADER = 100_000_000  # bytes, the format's limit
_A_TENSOR = 256  # most bytes per tensor in the header
_ALIGNED = 8
_CHECKED_BYTES = 4 * 2**20  # a block that fits into the processor's cache
Indices = NDArray[np.int64]


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file. Only the header is read, so the file may be incomplete.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it has no valid header.
    """
    return _read_header(path)[0].get(_METADATA, {})


def is_of_kind(path: Path, kind: str) -> bool:
    """Return True if a path is a file of this tool whose metadata states this kind."""
    try:
        return path.is_file() and read_metadata(path).get("dinocli") == kind
    except (OSError, ValueError):
        return False


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Load the tensors of a safetensors file into memory. Return them and the metadata.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is corrupt or of another kind.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in list(file.keys())}, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(_explain(error)) from error


def map_tensors(path: Path, *, verify: bool = True) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Return the memory-mapped tensors of a safetensors file, and its metadata.

    If the file has a checksum, it is verified first, which reads the whole file; a large file only the first time.

    Args:
        path: File to map.
        verify: False to skip the checksum, for files whose parts are verified when they are read.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is corrupt or of another kind, or holds types that numpy lacks.
    """
    try:
        with safe_open(path, framework="numpy"):
            pass  # checks that header and length agree
    except SafetensorError as error:
        raise ValueError(_explain(error)) from error
    header, start = _read_header(path)
    metadata = header.get(_METADATA, {})
    known = metadata.pop(KEY, None)
    if verify and known is not None and not verified(path, known, start, header):
        raise ValueError("its checksum does not match")
    tensors: dict[str, NDArray[Any]] = {}
    for name, told in header.items():
        if name == _METADATA:
            continue
        if told["dtype"] not in _DTYPES:
            raise ValueError(f"{name} has the type {told['dtype']}; expected one of {', '.join(_DTYPES)}")
        dtype, shape = _DTYPES[told["dtype"]], tuple(told["shape"])
        begin, end = told["data_offsets"]
        # Empty tensors cannot be mapped.
        tensors[name] = np.memmap(path, dtype, "r", start + begin, shape) if end > begin else np.empty(shape, dtype)
    return tensors, metadata


def _explain(error: SafetensorError) -> str:
    """Return the reason in plain words; the library's own names its parser."""
    words = str(error).lower()
    if "incomplete" in words or "fully covered" in words:
        return "its size differs from the one in its header; it may be truncated"
    return "its header is not valid"


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return the header of a safetensors file, and the offset of its first tensor."""
    with path.open("rb") as file:
        room = int.from_bytes(file.read(8), "little")
        if room > _HEADER:
            raise ValueError("it is not a safetensors file")
        header = parse(file.read(room))
    if not isinstance(header, dict) or not isinstance(header.get(_METADATA, {}), dict):
        raise ValueError("its header is not valid")
    return header, 8 + room


def _pack_header(header: Mapping[str, Any], room: int = 0) -> bytes:
    """Return the bytes before the first tensor: length and JSON, padded with spaces to at least `room` characters.

    Source: the format, https://github.com/huggingface/safetensors: length of the header, header, numbers.
    """
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    room = max(room, len(text) + -len(text) % _ALIGNED)
    return room.to_bytes(8, "little") + text.ljust(room)


def _describe(kind: str, shape: Sequence[int], begin: int, end: int) -> dict[str, Any]:
    """Return the entry of a tensor in the header."""
    return {"dtype": kind, "shape": shape, "data_offsets": (begin, end)}


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

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the stored numbers; an index returns float32."""
        return self._parts[0].dtype

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

    Rows of the first tensor are written in place. Rows of the others go to files next to it, named after them, which
    `finish` appends and removes. The metadata gets a checksum of all tensors and the header, which `map_tensors`
    verifies.

    Args:
        path: Path of the file; use a draft, because the file is incomplete until `finish`.
        names: Keys of the tensors, in the order in which they are written.
        metadata: Strings for the header of the safetensors file.
        state: Result of `save` of an earlier stream with the same path, names and metadata. The stream continues after
            the rows saved then. If None, the stream is new.

    Raises:
        ValueError: If the files do not hold the rows of `state`.
    """

    def __init__(
        self, path: Path, names: Sequence[str], metadata: dict[str, str], state: Mapping[str, Any] | None = None
    ) -> None:
        self._metadata = metadata
        # The header comes first and holds every tensor's shape, but shapes are known only at the end. So it gets room
        # in advance, padded with spaces, as the format allows.
        self._start = len(_pack_header({_METADATA: metadata})) + _A_TENSOR * (2 * len(names) + 1)
        self._paths = {name: path.with_name(f"{path.name}.{name}") if i else path for i, name in enumerate(names)}
        self._files: dict[str, BinaryIO] = {}
        self._told: dict[str, tuple[str, list[int]]] = {}  # type and shape
        self._crcs = dict.fromkeys(names, 0)  # of the numbers written to each file
        if state:
            self._continue(state)
            return
        for name, place in self._paths.items():
            self._files[name] = place.open("w+b")
        self._file = self._files[names[0]]
        self._file.write(b" " * self._start)

    def _continue(self, state: Mapping[str, Any]) -> None:
        for name, place in self._paths.items():
            if not place.exists():
                raise ValueError(f"{place.name} is missing")
            file = self._files[name] = place.open("r+b")
            file.truncate(state["bytes"][name])  # removes later rows, which were not synced
            if crc_of_file(place, self._start if len(self._files) == 1 else 0) != state["crcs"][name]:
                raise ValueError(f"{place.name} has other bytes than those saved")
            file.seek(0, os.SEEK_END)
        self._file = next(iter(self._files.values()))
        self._told = {name: (kind, list(shape)) for name, (kind, shape) in state["told"].items()}
        self._crcs = dict(state["crcs"])

    def save(self) -> dict[str, Any]:
        """Sync the rows to disk; return the state, as JSON, from which another stream can continue."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        sizes = {name: file.tell() for name, file in self._files.items()}
        return {"told": dict(self._told), "bytes": sizes, "crcs": dict(self._crcs)}

    def append(self, name: str, rows: NDArray[Any]) -> None:
        """Add rows of the same type and size as the earlier ones. [B, ...]"""
        plain = _plain(rows)
        _, (there, *_) = self._told.get(name, ("", [0]))
        self._told[name] = _KINDS[plain.dtype.str], [there + len(rows), *rows.shape[1:]]
        self._files[name].write(plain.data)
        if plain.size:
            self._crcs[name] = zlib.crc32(plain.data.cast("B"), self._crcs[name])

    def finish(self) -> None:
        """Append the other tensors, write the header, and sync the file to disk."""
        header: dict[str, Any] = {_METADATA: self._metadata}
        end, crc = 0, 0
        for name, file in self._files.items():
            begin, end = end, end + file.tell() - (self._start if file is self._file else 0)
            if file is self._file:
                crc = self._crcs[name]
            else:
                file.seek(0)
                while piece := file.read(1 << 20):
                    crc = self._put(piece, crc)
                self._paths[name].unlink()
            header[name] = _describe(*self._told[name], begin, end)
            if rest := -end % _ALIGNED:  # the next tensor may be int64; the format allows no holes, so this has a name
                crc = self._put(b"\0" * rest, crc)
                header[f"padding of {name}"] = _describe("U8", [rest], end, end + rest)
                end += rest
        header[_METADATA] = self._metadata | {KEY: f"{crc_of(header, crc):08x}"}
        self._file.seek(0)
        self._file.write(_pack_header(header, self._start - 8))
        self._file.flush()
        os.fsync(self._file.fileno())

    def _put(self, piece: bytes, crc: int) -> int:
        self._file.write(piece)
        return zlib.crc32(piece, crc)

    def close(self) -> None:
        """Close the files, complete or not."""
        for file in self._files.values():
            file.close()


def write_tensors(path: Path, tensors: dict[str, NDArray[Any]], metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically; the same tensors and metadata give the same bytes.

    Raises:
        OSError: If the disk is full or the place is not writable.
    """
    # Not written by the library, which orders metadata differently each time.
    plain = {name: _plain(values) for name, values in tensors.items()}
    # Wide types first, so that every tensor starts at a multiple of its item size.
    names = sorted(plain, key=lambda name: (-plain[name].itemsize, name))
    header: dict[str, Any] = {_METADATA: dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name in names:
        values, begin = plain[name], end
        end += values.nbytes
        header[name] = _describe(_KINDS[values.dtype.str], values.shape, begin, end)
    with atomic(path) as draft, draft.open("wb") as file:
        file.write(_pack_header(header))
        for name in names:
            file.write(plain[name].data)


def _plain(values: NDArray[Any]) -> NDArray[Any]:
    """Return the numbers as the format stores them: contiguous, in little-endian order."""
    return np.asarray(values, values.dtype.newbyteorder("<"), order="C")


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Return a digest of weights, as sixteen hexadecimal digits."""
    import torch  # only here: features are read and compared without torch

    digest = hashlib.sha256()
    for key in sorted(weights):
        digest.update(key.encode())
        digest.update(weights[key].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
