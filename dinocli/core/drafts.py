"""Drafts: private folders next to their targets, and the removal of those left by killed writers."""

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
_LONG = 3600.0  # seconds
# Errors of a write to an open file, which do not name the file.
_OF_A_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


@contextlib.contextmanager
def drafting(path: Path) -> Iterator[Path]:
    """Yield a free path of the same name in a private folder next to `path`, which is removed at the end.

    Nobody can predict the folder's name or plant a link in it. The folder holds a mark, which is locked while this
    process lives. So `sweep` recognises the drafts of killed processes, whatever their process ids.

    Missing folders above `path` are created, and removed again if the block raises.

    Raises:
        OSError: If the disk is full or the folder is not writable. The error names `path`.
    """
    folder = path.with_name(f".dinocli-{secrets.token_hex(8)}.part")
    with _name_user_path(path, folder), _parents(path):
        folder.mkdir(0o700)
        held = None
        try:
            held = _mark(folder, path.name)
            yield folder / path.name
        finally:
            if held:
                held.close()
            _remove(folder)


def discard(folder: Path) -> None:
    """Remove a folder by renaming it first, so that nobody finds it with only some of its files."""
    with drafting(folder) as gone:
        folder.rename(gone)


def sweep(folder: Path, first: int | None = None) -> None:
    """Remove the drafts of killed writers in a folder, and restore the folders that they were about to replace.

    A draft is a folder with a name of ours and our mark, which no living process has locked. Nothing else is touched,
    whatever its name.

    Args:
        folder: Folder to sweep, which may be missing.
        first: Number of entries to check, in no order. If None, all are checked.
    """
    try:
        with os.scandir(folder) as entries:
            named = [e for e in islice(entries, first) if _DRAFT.fullmatch(e.name)]
            drafts = [folder / entry.name for entry in named if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return
    for draft in drafts:
        with contextlib.suppress(OSError):
            _sweep_one(draft)


def _sweep_one(draft: Path) -> None:
    mark = draft / _MARK
    if not mark.exists():
        if _silent(draft):  # killed before it wrote its mark: it is empty, or not ours
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
        # Locks may not reach other machines: a draft from another one, or from before a reboot, must be old.
        if ours == _OURS and (boot == _boot() or _silent(draft)):
            path = draft.with_name(os.path.basename(os.fsdecode(name)))
            if (draft / BEFORE).is_dir() and not os.path.lexists(path):
                (draft / BEFORE).rename(path)
            _remove(draft)
    except ValueError:
        return  # not a mark of ours
    finally:
        held.close()


def _silent(draft: Path) -> bool:
    """Return whether nothing in a draft has changed for `_LONG` seconds."""
    with contextlib.suppress(OSError):
        times = [path.lstat().st_mtime for path in (draft, *draft.rglob("*"))]
        return time.time() - max(times) > _LONG
    return False


def _remove(draft: Path) -> None:
    """Remove a draft, its mark last: after a kill on the way, the rest is still recognised as ours."""
    with contextlib.suppress(OSError):
        for path in draft.iterdir():
            if path.name != _MARK:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        (draft / _MARK).unlink(missing_ok=True)
        draft.rmdir()


def _mark(folder: Path, name: str) -> Lock | None:
    """Write and lock the mark of a draft folder; return None on a file system without locks."""
    new = folder / f"{_MARK}.new"
    new.write_bytes(b"\0".join((_OURS, _boot(), os.fsencode(name))))
    held = lock(new, os.O_RDWR)
    new.rename(folder / _MARK)  # so that it is never visible without its lock
    return held


def _boot() -> bytes:
    """Return an id of the current boot of this machine, the same in all of its containers."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
    except OSError:
        return platform.node().encode()


@contextlib.contextmanager
def _name_user_path(path: Path, draft: Path) -> Iterator[None]:
    """Make a system error that names the draft, or no file, name the path that the user knows."""
    try:
        yield
    except OSError as error:
        ours = str(error.filename).startswith(str(draft)) if error.filename else error.errno in _OF_A_DISK
        if not ours:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextlib.contextmanager
def _parents(path: Path) -> Iterator[None]:
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
