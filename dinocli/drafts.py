"""Drafts: private folders beside what is being written, and how to remove those of killed writers."""

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

from dinocli.locks import Lock, lock

BEFORE = ".dinocli-before"  # in a draft: the folder that it is about to replace
_MARK = ".dinocli-mark"  # in a draft: says that it is ours, and is locked as long as its writer lives
_DRAFT = re.compile(r"\.dinocli-[0-9a-f]{16}\.part")
_OURS = b"draft of dinocli"
_LONG = 3600.0  # seconds
# What writing to an open file raises, without a name.
_OF_A_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


@contextlib.contextmanager
def drafting(path: Path) -> Iterator[Path]:
    """Yield a free path of the same name in a private folder beside `path`, which is removed at the end.

    Nobody can foresee the folder's name or plant a link in it. The folder holds a mark, which is locked as long as
    this process lives, so that `sweep` knows what a killed one has left, whatever number its process had.

    Missing folders above `path` are created; those that were created are removed if the block raises.

    Raises:
        OSError: The disk is full, or the folder cannot be written to; it names `path`.
    """
    folder = path.with_name(f".dinocli-{secrets.token_hex(8)}.part")
    with _naming(path, folder), _parents(path):
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
    """Remove a folder at once, before its files go one by one: nobody finds a part of it."""
    with drafting(folder) as gone:
        folder.rename(gone)


def sweep(folder: Path, first: int | None = None) -> None:
    """Remove the drafts that killed writers have left in a folder, and put back what they were about to replace.

    A draft is a folder of our own name that holds our mark, which no living process has locked. Nothing else is
    touched, whatever its name.

    Args:
        folder: May be missing.
        first: Look at so many of its entries only, in no order; if None, at all.
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
        if _silent(draft):  # killed before its mark was there: it is empty, or not ours
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
        # Locks may not reach to other machines: a draft of another one, or from before a restart, must be old.
        if ours == _OURS and (boot == _boot() or _silent(draft)):
            path = draft.with_name(os.path.basename(os.fsdecode(name)))
            if (draft / BEFORE).is_dir() and not os.path.lexists(path):
                (draft / BEFORE).rename(path)
            _remove(draft)
    except ValueError:
        return  # a mark of another kind
    finally:
        held.close()


def _silent(draft: Path) -> bool:
    """Return whether nothing in a draft has changed for long."""
    with contextlib.suppress(OSError):
        times = [path.lstat().st_mtime for path in (draft, *draft.rglob("*"))]
        return time.time() - max(times) > _LONG
    return False


def _remove(draft: Path) -> None:
    """Remove a draft, its mark last: what is killed on the way is still known as ours."""
    with contextlib.suppress(OSError):
        for path in draft.iterdir():
            if path.name != _MARK:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        (draft / _MARK).unlink(missing_ok=True)
        draft.rmdir()


def _mark(folder: Path, name: str) -> Lock | None:
    """Write and lock the mark of a draft folder; on a file system without locks, return None."""
    new = folder / f"{_MARK}.new"
    new.write_bytes(b"\0".join((_OURS, _boot(), os.fsencode(name))))
    held = lock(new, os.O_RDWR)
    new.rename(folder / _MARK)  # which so is never seen without its lock
    return held


def _boot() -> bytes:
    """Return what tells this start of this machine from others, in all of its containers alike."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
    except OSError:
        return platform.node().encode()


@contextlib.contextmanager
def _naming(path: Path, draft: Path) -> Iterator[None]:
    """Let an error of the system name the place that a user knows, where it names the draft, or nothing."""
    try:
        yield
    except OSError as error:
        ours = str(error.filename).startswith(str(draft)) if error.filename else error.errno in _OF_A_DISK
        if not ours:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextlib.contextmanager
def _parents(path: Path) -> Iterator[None]:
    """Make the folders above a path, and take away those that were made if the block raises."""
    missing = [parent for parent in path.parents if not parent.exists()]  # the nearest first
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in missing:
            with contextlib.suppress(OSError):  # never made, or another has put something there since
                folder.rmdir()
        raise
