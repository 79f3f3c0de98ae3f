"""Regular files, read whole up to a limit. FIFOs, devices and sockets are never opened."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from dinocli.data.images import DEFAULTS, ImagesConfig, megabytes_over

# A FIFO may replace the file between stat and open. Without O_NONBLOCK, open would wait for a writer.
_FLAGS = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_CLOEXEC", "O_NOCTTY", "O_BINARY"))
_PIECE = 2**16  # bytes per read after the size that stat reported
_LONGEST = 2**30  # bytes; some systems refuse to read more at once


class Refused(OSError):
    """Error for a file that is not read: `not a file: a FIFO` or `too large: ...`."""


def read_file(path: str | Path, images: ImagesConfig = DEFAULTS) -> bytes:
    """Read a regular file of at most `images.max_megabytes`.

    Memory stays below the limit even for sparse files and for files that grow while they are read.

    Raises:
        Refused: If the file is larger or not regular.
        OSError: If the file does not exist, is a folder, or permission is denied.
    """
    _check(_status(path), images)
    descriptor = os.open(path, _FLAGS)
    try:
        size = _check(os.fstat(descriptor), images)
        room = int(images.max_megabytes * 1e6) + 1
        parts = [os.read(descriptor, min(room, size + 1, _LONGEST))]
        # On some file systems a short read is not the end of the file. An empty read always is.
        while parts[-1] and (room := room - len(parts[-1])) > 0:
            parts.append(os.read(descriptor, min(room, max(size - sum(map(len, parts)), _PIECE), _LONGEST)))
    finally:
        os.close(descriptor)
    if room <= 0:
        raise Refused(f"too large: the file grew to over {images.max_megabytes:g} megabytes while it was read")
    return parts[0] if len(parts) == 2 and not parts[1] else b"".join(parts)


def read_span(path: str | Path, offset: int, size: int) -> bytes:
    """Read a part of a regular file.

    Raises:
        Refused: If the file ends earlier or is not regular.
        OSError: If the file does not exist, or permission is denied.
    """
    descriptor = os.open(path, _FLAGS)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise Refused("not a file")
        parts, left = list[bytes](), size
        while left and (part := os.pread(descriptor, min(left, _LONGEST), offset + size - left)):
            parts.append(part)
            left -= len(part)
    finally:
        os.close(descriptor)
    if left:
        raise Refused(f"truncated: {path} ends {left} bytes early")
    return parts[0] if len(parts) == 1 else b"".join(parts)


def check_file(path: str) -> str:
    """Return the path of a regular file of any size.

    Raises:
        OSError: If it does not exist, is a folder, or is not regular.
    """
    _check(_status(path), None)
    return path


def begins_with(path: str | Path, beginnings: tuple[bytes, ...], at: int = 0) -> bool:
    """Check if a regular file has one of `beginnings` at an offset. False if it cannot be read."""
    try:
        if not stat.S_ISREG(_status(path).st_mode):
            return False
        descriptor = os.open(path, _FLAGS)
        try:
            return os.read(descriptor, at + max(map(len, beginnings))).startswith(beginnings, at)
        finally:
            os.close(descriptor)
    except OSError:
        return False


def why_unread(error: OSError) -> str:
    """Return the reason for a skipped file as `category: details`. Reports count by category."""
    return str(error) if isinstance(error, Refused) else f"cannot be opened: {error.strerror or error}"


def _status(path: str | Path) -> os.stat_result:
    try:
        return os.stat(path)
    except ValueError as error:  # a null byte in a list of files
        raise Refused(f"cannot be opened: {error}") from error


def _check(status: os.stat_result, images: ImagesConfig | None) -> int:
    """Check that a file may be read, with limits or without, and return its size in bytes."""
    mode = status.st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(mode):
        raise Refused(f"not a file: {_kind(mode)}")
    if images and status.st_size > images.max_megabytes * 1e6:
        raise Refused(f"too large: {megabytes_over(status.st_size, images.max_megabytes)}")
    return status.st_size


def _kind(mode: int) -> str:
    if stat.S_ISFIFO(mode):
        return "a FIFO"
    return "a socket" if stat.S_ISSOCK(mode) else "a device"
