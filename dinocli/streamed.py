"""Safetensors files whose tensors grow, written in constant memory."""

from __future__ import annotations

import json
import os
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from dinocli.checksums import KEY, crc_of

_KINDS = {"float32": "F32", "float16": "F16", "int64": "I64", "uint8": "U8"}
_A_TENSOR = 256  # most bytes per tensor in the header
_ALIGNED = 8


class TensorStream:
    """Writer of tensors row by row; the file is complete once `finish` has returned.

    Rows of the first tensor are written in place. Rows of the others wait in unnamed files next to it, which vanish
    with the process, and are appended at the end. The metadata gets a checksum of all numbers and of the header, which
    `map_tensors` verifies.

    Args:
        path: Path of the file; use a draft, because the file is incomplete until `finish`.
        names: Names of the tensors.
        metadata: Metadata of the file.
    """

    def __init__(self, path: Path, names: Sequence[str], metadata: dict[str, str]) -> None:
        self._metadata = metadata
        # The header comes first and holds every tensor's shape, but shapes are known only at the end. So it gets room
        # in advance, padded with spaces, as the format allows.
        self._room = len(json.dumps({"__metadata__": metadata})) + _A_TENSOR * (2 * len(names) + 1)
        self._room += -self._room % _ALIGNED
        self._file = path.open("wb")
        self._file.write(b" " * (8 + self._room))
        self._files: dict[str, BinaryIO] = {names[0]: self._file}
        for name in names[1:]:
            self._files[name] = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115, closed by `close`
        self._told: dict[str, dict[str, Any]] = {}
        self._crc = 0  # of the numbers written in place

    def append(self, name: str, rows: NDArray[Any]) -> None:
        """Add rows of the same type and size as the earlier ones. [B, ...]"""
        there = self._told.get(name, {"shape": [0]})["shape"][0]
        self._told[name] = {"dtype": _KINDS[rows.dtype.name], "shape": [there + len(rows), *rows.shape[1:]]}
        plain = np.ascontiguousarray(rows, rows.dtype.newbyteorder("<"))
        self._files[name].write(plain.data)
        if self._files[name] is self._file and plain.size:
            self._crc = zlib.crc32(plain.data.cast("B"), self._crc)

    def finish(self) -> None:
        """Append the other tensors, write the header, and sync the file to disk."""
        header: dict[str, Any] = {"__metadata__": self._metadata}
        end = 0
        for name, file in self._files.items():
            begin, end = end, end + file.tell() - (8 + self._room if file is self._file else 0)
            if file is not self._file:
                file.seek(0)
                while piece := file.read(1 << 20):
                    self._put(piece)
            header[name] = self._told[name] | {"data_offsets": [begin, end]}
            if rest := -end % _ALIGNED:  # the next tensor may be int64; the format allows no holes, so this has a name
                self._put(b"\0" * rest)
                header[f"padding of {name}"] = {"dtype": "U8", "shape": [rest], "data_offsets": [end, end + rest]}
                end += rest
        header["__metadata__"] = self._metadata | {KEY: f"{crc_of(header, self._crc):08x}"}
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + json.dumps(header).encode().ljust(self._room))
        self._file.flush()
        os.fsync(self._file.fileno())

    def _put(self, piece: bytes) -> None:
        self._file.write(piece)
        self._crc = zlib.crc32(piece, self._crc)

    def close(self) -> None:
        """Close the files, complete or not."""
        for file in self._files.values():
            file.close()
