"""Locks that end with the process that holds them, and that forked children do not inherit."""

from __future__ import annotations

import os
from pathlib import Path


class Lock:
    """Exclusive lock on an open file or folder, until `close` or the end of this process.

    A forked child inherits the open file and with it the lock, so each child closes the file when it starts. Thus the
    lock ends with this process, even if that is killed, and not with the last of its workers.

    Args:
        file: Descriptor of the open, locked file.
    """

    def __init__(self, file: int) -> None:
        from multiprocessing.util import register_after_fork

        self._file = file
        register_after_fork(self, Lock.close)

    def close(self) -> None:
        """Release the lock."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def lock(path: Path, flags: int = os.O_RDONLY) -> Lock | None:
    """Lock a file or a folder; return None if the system or the file system has no locks for it.

    Args:
        path: Existing file or folder.
        flags: Flags for `os.open`.

    Raises:
        BlockingIOError: If another process holds the lock.
        OSError: If `path` cannot be opened.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    file = os.open(path, flags)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise
    except OSError:
        os.close(file)
        return None
    return Lock(file)
