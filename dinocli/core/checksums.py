"""Checksums of JSON objects and of files, to detect corruption."""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

KEY = "crc32"
_CHUNK = 1 << 22  # bytes; larger chunks are slower, because they exceed the processor's cache
_LARGE = 1 << 28  # bytes; reading as many takes about 0.2 seconds
_ATTRIBUTE = "user.dinocli.verified"


def crc_of(data: Mapping[str, Any], begin: int = 0) -> int:
    """Compute the checksum of a JSON object, independent of the order of its keys.

    Args:
        data: JSON object as `json.loads` returns it.
        begin: Checksum of preceding bytes to continue from.
    """
    return zlib.crc32(json.dumps(data, sort_keys=True).encode(), begin)


def seal(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a JSON object with its checksum added under the key `crc32`."""
    return {**data, KEY: f"{crc_of(data):08x}"}


def parse(text: bytes | str) -> Any:
    """Parse JSON.

    Raises:
        ValueError: If the text is not valid JSON, or is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:  # also of bytes that are not UTF-8; json's own message names places and delimiters
        raise ValueError("it is not valid JSON") from error


def unseal(text: bytes | str) -> dict[str, Any]:
    """Parse a JSON object, and verify its checksum if it has one; files of earlier versions have none.

    Raises:
        ValueError: If the text is not a JSON object, or its checksum differs.
    """
    data = parse(text)
    if not isinstance(data, dict):
        raise ValueError("it is not a JSON object")
    expected = data.pop(KEY, None)
    try:
        if expected is not None and expected != f"{crc_of(data):08x}":
            raise ValueError("its checksum does not match")
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return data


def crc_of_file(path: Path, skip: int = 0) -> int:
    """Compute the checksum of a file's bytes after the first `skip`.

    Raises:
        OSError: If the file cannot be read.
    """
    crc, buffer = 0, bytearray(_CHUNK)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        file.seek(skip)
        while count := file.readinto(buffer):
            crc = zlib.crc32(view[:count], crc)
    return crc


def verified(path: Path, known: str, skip: int = 0, header: Mapping[str, Any] | None = None) -> bool:
    """Check a file against its checksum.

    A large file is read only the first time, if the file system has extended attributes. One of them then records the
    checksum together with the file's size, modification time and inode, which must all be unchanged.

    Args:
        path: File to check.
        known: Expected checksum, as eight hexadecimal digits.
        skip: Number of bytes at the start that the checksum does not cover.
        header: JSON object that the checksum covers after the file's bytes. If None, it covers only the bytes.

    Raises:
        OSError: If the file cannot be read.
    """
    stat = path.stat()
    record = f"{known} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino} {crc_of(header or {}):08x}".encode()
    large = stat.st_size >= _LARGE and hasattr(os, "getxattr")
    if large:
        with contextlib.suppress(OSError):
            if os.getxattr(path, _ATTRIBUTE) == record:
                return True
    crc = crc_of_file(path, skip)
    valid = f"{crc if header is None else crc_of(header, crc):08x}" == known
    if valid and large:
        with contextlib.suppress(OSError):  # another user's file, or a file system without attributes
            os.setxattr(path, _ATTRIBUTE, record)
    return valid
