"""Checksums that distinguish corrupt files from valid ones, in JSON and over whole files."""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

KEY = "crc32"
_PIECE = 1 << 22  # bytes; larger pieces are slower, because they exceed the processor's cache
_WORTH_REMEMBERING = 1 << 28  # bytes, about 0.2 seconds
_REMEMBERED = "user.dinocli.verified"


def crc_of(data: Mapping[str, Any], begin: int = 0) -> int:
    """Compute the checksum of a JSON object, whatever the order of its keys.

    Args:
        data: JSON object as `json.loads` returns it.
        begin: Checksum of the bytes before the object.
    """
    return zlib.crc32(json.dumps(data, sort_keys=True).encode(), begin)


def seal(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON object with its checksum as one more key."""
    return {**data, KEY: f"{crc_of(data):08x}"}


def parse(text: bytes | str) -> Any:
    """Parse JSON.

    Raises:
        ValueError: If the text is no valid JSON, or is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def unseal(text: bytes | str) -> dict[str, Any]:
    """Parse a JSON object and verify its checksum, if it has one; files of earlier versions have none.

    Raises:
        ValueError: If the text is no JSON object, or its checksum differs.
    """
    data = parse(text)
    if not isinstance(data, dict):
        raise ValueError("it is not a JSON object")
    known = data.pop(KEY, None)
    try:
        if known is not None and known != f"{crc_of(data):08x}":
            raise ValueError("its checksum does not match")
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return data


def crc_of_file(path: Path, skip: int = 0) -> int:
    """Compute the checksum of a file's bytes after the first `skip`.

    Raises:
        OSError: If the file cannot be read.
    """
    total, piece = 0, bytearray(_PIECE)
    view = memoryview(piece)
    with path.open("rb", buffering=0) as file:
        file.seek(skip)
        while count := file.readinto(piece):
            total = zlib.crc32(view[:count], total)
    return total


def verified(path: Path, known: str, skip: int = 0, header: Mapping[str, Any] | None = None) -> bool:
    """Check a file against its checksum.

    A large file is read only once: an extended attribute stores the size, time and inode of the verified bytes, if the
    file system has attributes.

    Args:
        path: File to check.
        known: Expected checksum, as eight hexadecimal digits.
        skip: Number of bytes at the start that the checksum does not cover.
        header: JSON object that the checksum covers after the bytes. If None, it covers the bytes alone.

    Raises:
        OSError: If the file cannot be read.
    """
    told = path.stat()
    state = f"{known} {told.st_size} {told.st_mtime_ns} {told.st_ino} {crc_of(header or {}):08x}".encode()
    large = told.st_size >= _WORTH_REMEMBERING and hasattr(os, "getxattr")
    if large:
        with contextlib.suppress(OSError):
            if os.getxattr(path, _REMEMBERED) == state:
                return True
    total = crc_of_file(path, skip)
    valid = f"{total if header is None else crc_of(header, total):08x}" == known
    if valid and large:
        with contextlib.suppress(OSError):  # another user's file, or a file system without attributes
            os.setxattr(path, _REMEMBERED, state)
    return valid
