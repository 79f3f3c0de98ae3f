"""Files that are whole or not there: written beside their place, synced, and renamed into it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# What writing to an open file raises, without a name.
_OF_A_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, and put the file there in the place of `path` when the block ends well.

    The folder is made where it is missing. When the block raises, what stood at `path` before stands there still, and
    the temporary file and any folder that was made for it are gone.

    Raises:
        OSError: The disk is full, or the place may not be written to; it names `path`.
    """
    # The process id keeps two runs that write the same place from mixing their bytes.
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    with _naming(path, draft), _parents(path):
        try:
            yield draft
            with draft.open("rb+") as file:
                os.fsync(file.fileno())
            # Some writers make private files; what the tool leaves is for whoever the user lets read it.
            umask = os.umask(0)
            os.umask(umask)
            draft.chmod(0o666 & ~umask)
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
    _sync_folder(path.parent)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`, and put it in the place of `path` when the block ends well.

    When the block raises, what stood at `path` before stands there still, and the temporary folder and any folder that
    was made for it are gone. Each file in it is to be written with `atomic`, `write_text` or `write_tensors`.

    Raises:
        OSError: The disk is full, the place may not be written to, or a file or a link stands there; it names `path`.
    """
    _refuse_others(path)
    with draft_folder(path) as draft:
        yield draft
        put_folder(draft, path)


@contextlib.contextmanager
def draft_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`, which is gone at the end, unless the block has put it elsewhere.

    Raises:
        OSError: The disk is full, or the place may not be written to; it names `path`.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    with _naming(path, draft), _parents(path):
        draft.mkdir()
        try:
            yield draft
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def put_folder(draft: Path, path: Path) -> None:
    """Put a folder in the place of another, if there is one.

    Raises:
        OSError: A file or a link stands there, and is left; it names `path`.
    """
    _refuse_others(path)
    before = path.with_name(f".{path.name}.{os.getpid()}.old")
    try:
        if path.exists():
            path.rename(before)
        try:
            draft.rename(path)
        except OSError:
            if before.exists():
                before.rename(path)
            raise
    finally:
        shutil.rmtree(before, ignore_errors=True)
    _sync_folder(path.parent)


def _refuse_others(path: Path) -> None:
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))


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


def sweep(folder: Path) -> None:
    """Take away the drafts that writers who were killed have left in a folder; nobody else may be writing there.

    They are told by the number of a process in their names, so that a user's own `.bashrc.old` stays.
    """
    for path in folder.glob(".*"):
        if re.fullmatch(r"\..+\.[0-9]+\.(part|old)", path.name, re.DOTALL):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _sync_folder(path: Path) -> None:
    """A rename is durable only once its folder is synced, where the system can sync one."""
    with contextlib.suppress(OSError):
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with atomic(path) as draft:
        draft.write_text(text, encoding="utf-8", errors="surrogateescape")  # file names may hold any bytes


def write_tensors(path: Path, tensors: dict[str, NDArray[Any]], metadata: dict[str, str]) -> None:
    """Write a safetensors file whole or not at all; the same tensors and metadata give the same bytes.

    Raises:
        OSError: The disk is full, or the place may not be written to.

    Source: the format, https://github.com/huggingface/safetensors: length of the header, header, numbers.
    """
    # Written here and not by the library, which puts metadata in another order each time.
    plain = {name: np.asarray(values, order="C") for name, values in tensors.items()}
    plain = {name: values.astype(values.dtype.newbyteorder("<"), copy=False) for name, values in plain.items()}
    # Wide numbers first, so that every tensor begins at a multiple of its numbers' width.
    names = sorted(plain, key=lambda name: (-plain[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name in names:
        values, begin = plain[name], end
        end += values.nbytes
        header[name] = {"dtype": _dtype(values), "shape": values.shape, "data_offsets": (begin, end)}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic(path) as draft, draft.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(plain[name].data)


def _dtype(values: NDArray[Any]) -> str:
    """The format's name of a type: F32, I64, U8, BOOL."""
    letters = {"f": "F", "i": "I", "u": "U"}
    return "BOOL" if values.dtype.kind == "b" else f"{letters[values.dtype.kind]}{8 * values.itemsize}"
