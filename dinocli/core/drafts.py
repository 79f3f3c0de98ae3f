"""Drafts: private temporary folders next to their targets, and the removal of those that killed writers left."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from dinocli.core.locks import Lock, lock

BEFORE = ".dinocli-before"  # in a draft: the folder that it is about to replace
_MARK = ".dinocli-mark"  # in a draft: identifies it as ours, and is locked while its writer lives
_DRAFT = re.compile(r"\.dinocli-[0-9a-f]{16}\.part")
_OURS = b"draft of dinocli"
_STALE_AGE = 3600.0  # seconds
# Errors of a write to an open file, which do not name the file.
_WRITE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


@contextlib.contextmanager
def drafting(path: Path) -> Iterator[Path]:
    """Yield a path to write to, in a private folder next to `path`; the folder is removed at the end.

    The yielded path has the file name of `path`, and nothing exists there. Other users cannot predict the folder's name
    or plant a link in it. The folder contains a mark, a file that is locked while this process lives. Thus `sweep`
    recognises the drafts of killed processes without relying on process ids.

    Missing folders above `path` are created, and removed again if the block raises.

    Raises:
        OSError: If the disk is full or the folder is not writable. The error names `path`.
    """
    folder = path.with_name(f".dinocli-{secrets.token_hex(8)}.part")
    with name_user_path(path, folder), _create_parents(path):
        folder.mkdir(0o700)
        held = None
        try:
            held = _write_mark(folder, path.name)
            yield folder / path.name
        finally:
            if held:
                held.close()
            _remove(folder)


def discard(folder: Path) -> None:
    """Remove a folder by renaming it first, so that other processes never see it with only some of its files."""
    with drafting(folder) as trash:
        folder.rename(trash)


def sweep(folder: Path, first: int | None = None) -> None:
    """Remove the drafts of killed writers in a folder, and restore the folders that they were about to replace.

    Only a folder with a draft's name and a mark that no living process has locked is removed.

    Args:
        folder: Folder to sweep, which may be missing.
        first: Maximum number of entries to check, in arbitrary order. If None, all are checked.
    """
    try:
        with os.scandir(folder) as entries:
            named = [entry for entry in islice(entries, first) if _DRAFT.fullmatch(entry.name)]
            drafts = [folder / entry.name for entry in named if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return
    for draft in drafts:
        with contextlib.suppress(OSError):
            _sweep_one(draft)


def _sweep_one(draft: Path) -> None:
    mark = draft / _MARK
    if not mark.exists():
        if _is_stale(draft):  # its writer was killed before it wrote the mark, or the folder is not ours
            (draft / f"{_MARK}.new").unlink(missing_ok=True)
            draft.rmdir()
        return
    try:
        held = lock(mark, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
    except BlockingIOError:  # its writer lives
        return
    if held is None:
        return
    try:
        ours, boot, name = mark.read_bytes().split(b"\0")
        # Locks may not work across machines: a draft from another machine, or from before a reboot, must be stale.
        if ours == _OURS and (boot == _read_boot_id() or _is_stale(draft)):
            path = draft.with_name(os.path.basename(os.fsdecode(name)))
            if (draft / BEFORE).is_dir() and not os.path.lexists(path):
                (draft / BEFORE).rename(path)
            _remove(draft)
    except ValueError:
        return  # not a mark of ours
    finally:
        held.close()


def _is_stale(draft: Path) -> bool:
    """Return True if nothing in a draft has changed for `_STALE_AGE` seconds."""
    with contextlib.suppress(OSError):
        times = [path.lstat().st_mtime for path in (draft, *draft.rglob("*"))]
        return time.time() - max(times) > _STALE_AGE
    return False


def _remove(draft: Path) -> None:
    """Remove a draft, its mark last: if this process is killed midway, `sweep` still recognises the rest."""
    with contextlib.suppress(OSError):
        for path in draft.iterdir():
            if path.name != _MARK:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        (draft / _MARK).unlink(missing_ok=True)
        draft.rmdir()


def _write_mark(folder: Path, name: str) -> Lock | None:
    """Write and lock the mark of a draft folder; return None on a file system without locks."""
    new = folder / f"{_MARK}.new"
    new.write_bytes(b"\0".join((_OURS, _read_boot_id(), os.fsencode(name))))
    held = lock(new, os.O_RDWR)
    new.rename(folder / _MARK)  # only now, so that `sweep` never sees the mark unlocked
    return held


def _read_boot_id() -> bytes:
    """Return an id of this machine's current boot, which is the same in all of its containers."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
    except OSError:
        return platform.node().encode()


@contextlib.contextmanager
def name_user_path(path: Path, draft: Path) -> Iterator[None]:
    """Replace the file name of a system error by the user's path, if the error names the draft or no file.

    Args:
        path: Path that the user named.
        draft: Folder of temporary files.

    Raises:
        OSError: If the block raises one.
    """
    try:
        yield
    except OSError as error:
        from_draft = str(error.filename).startswith(str(draft)) if error.filename else error.errno in _WRITE_ERRORS
        if not from_draft:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextlib.contextmanager
def _create_parents(path: Path) -> Iterator[None]:
    """Create the folders above a path, and remove the created ones if the block raises."""
    missing = [parent for parent in path.parents if not parent.exists()]  # the nearest first
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in missing:
            with contextlib.suppress(OSError):  # never created, or another process has used it since
                folder.rmdir()
        raise
