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

_FIRST = 1000  # entries of a folder to sweep, in less than a millisecond
_HERE, _RENAME_EXCHANGE = -100, 2  # AT_FDCWD and a flag of Linux's renameat2


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path, and move the file there to `path` when the block succeeds.

    Missing folders are created. If the block raises, an earlier file at `path` is unchanged, and the temporary file and
    any created folders are removed.

    Raises:
        OSError: If the disk is full or the place is not writable. The error names `path`.
    """
    sweep(path.parent, _FIRST)
    with drafting(path) as draft:
        yield draft
        with draft.open("rb+") as file:
            os.fsync(file.fileno())
        # Some writers create private files; outputs get the permissions of the user's umask.
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
    _refuse_others(path)
    with draft_folder(path) as draft:
        yield draft
        put_folder(draft, path)


@contextlib.contextmanager
def draft_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder, which is removed at the end unless the block moved it.

    Drafts of killed writers next to `path` are removed first.

    Raises:
        OSError: If the disk is full or the place is not writable. The error names `path`.
    """
    sweep(path.parent)
    with drafting(path) as draft:
        draft.mkdir()
        yield draft


def put_folder(draft: Path, path: Path) -> None:
    """Move a folder from `draft_folder` to `path`, replacing an existing folder.

    Whenever this process is killed, `path` is the old folder or the new one. If the system cannot exchange two folders
    in one step, `path` may be missing for a moment. Then the old folder is in the draft, and `sweep` restores it.

    Raises:
        OSError: If `path` is a file or a link, which stays unchanged. The error names `path`.
    """
    _refuse_others(path)
    if not (path.exists() and _exchange(draft, path)):
        before = draft.with_name(BEFORE)
        if path.exists():
            path.rename(before)
        try:
            draft.rename(path)
        except OSError:
            if before.exists():
                before.rename(path)
            raise
    _sync_folder(path.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step; return False if the system or the file system cannot."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux
        return False
    return call(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _RENAME_EXCHANGE) == 0


def _refuse_others(path: Path) -> None:
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))


def _sync_folder(path: Path) -> None:
    """Sync a folder, if the system can: only then is a rename in it durable."""
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
