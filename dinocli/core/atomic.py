"""Atomic writes: files are written next to their target, synced, and renamed over it."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dinocli.core.checksums import seal
from dinocli.core.drafts import BEFORE, drafting, sweep

_SWEPT_ENTRIES = 1000  # entries of a folder to check for old drafts before a write; takes less than a millisecond
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # arguments of Linux's renameat2, from fcntl.h and fs.h


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path, and rename the file written there to `path` when the block succeeds.

    Missing folders are created. If the block raises, an earlier file at `path` is unchanged, and the temporary file and
    any created folders are removed.

    Raises:
        OSError: If the disk is full or the place is not writable. The error names `path`.
    """
    sweep(path.parent, _SWEPT_ENTRIES)
    with drafting(path) as draft:
        yield draft
        with draft.open("rb+") as file:
            os.fsync(file.fileno())
        # Some writers create files that only the owner can read; apply the user's umask as for any other file.
        umask = os.umask(0)
        os.umask(umask)
        draft.chmod(0o666 & ~umask)
        draft.replace(path)
    _sync_folder(path.parent)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder, and replace `path` with it when the block succeeds.

    If the block raises, an earlier folder at `path` is unchanged, and the temporary folder and any created folders are
    removed. Write each file in it with `atomic`, `write_text` or `write_tensors`.

    Raises:
        OSError: If the disk is full, the place is not writable, or `path` is a file or a link. The error names `path`.
    """
    _check_replaceable(path)
    with draft_folder(path) as draft:
        yield draft
        put_folder(draft, path)


@contextlib.contextmanager
def draft_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder next to `path`, and remove it at the end unless the block has moved it.

    Drafts that killed writers left next to `path` are removed first.

    Raises:
        OSError: If the disk is full or the place is not writable. The error names `path`.
    """
    sweep(path.parent)
    with drafting(path) as draft:
        draft.mkdir()
        yield draft


def put_folder(draft: Path, path: Path) -> None:
    """Move a folder from `draft_folder` to `path`, replacing an existing folder.

    If this process is killed at any time, `path` is the old folder or the new one. A system that cannot exchange two
    folders in one step needs two renames. After a kill between them `path` is missing: the old folder is still in the
    draft, and `sweep` restores it.

    Raises:
        OSError: If `path` is a file or a link, which stays unchanged. The error names `path`.
    """
    _check_replaceable(path)
    if not (path.exists() and _exchange(draft, path)):
        backup = draft.with_name(BEFORE)
        if path.exists():
            path.rename(backup)
        try:
            draft.rename(path)
        except OSError:
            if backup.exists():
                backup.rename(path)
            raise
    _sync_folder(path.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step; return False if the system or the file system does not support it."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux
        return False
    return call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0


def _check_replaceable(path: Path) -> None:
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))


def _sync_folder(path: Path) -> None:
    """Sync a folder if the system supports it, so that a rename in it survives a power failure."""
    with contextlib.suppress(OSError):
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic(path) as draft:
        draft.write_text(text, encoding="utf-8", errors="surrogateescape")  # file names may hold any bytes


def write_json(path: Path, data: Mapping[str, Any], *, indent: int | None = None) -> None:
    """Write a JSON object atomically, with a checksum that `unseal` verifies."""
    write_text(path, json.dumps(seal(data), indent=indent))
