"""Files that are whole or not there: written beside their place, synced, and renamed into it."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save_file


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, and put the file there in the place of `path` when the block ends well.

    The folder is made where it is missing. When the block raises, what stood at `path` before stands there still and
    the temporary file is gone.

    Raises:
        OSError: The disk is full, or the place may not be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The process id keeps two runs that write the same place from mixing their bytes.
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
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

    When the block raises, what stood at `path` before stands there still and the temporary folder is gone. Each file in
    it is to be written with `atomic`, `write_text` or `write_tensors`.

    Raises:
        OSError: The disk is full, or the place may not be written to.
    """
    draft, before = (path.with_name(f".{path.name}.{os.getpid()}.{end}") for end in ("part", "old"))
    draft.mkdir(parents=True)
    try:
        yield draft
        if path.exists():
            path.rename(before)
        draft.rename(path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        shutil.rmtree(before, ignore_errors=True)
    _sync_folder(path.parent)


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
    """Write a safetensors file whole or not at all.

    Raises:
        OSError: The disk is full, or the place may not be written to.
    """
    # The library writes memory as it lies: of a view into another array that would be the wrong numbers.
    tensors = {name: np.asarray(values, order="C") for name, values in tensors.items()}
    with atomic(path) as draft:
        try:
            save_file(tensors, draft, metadata)
        except SafetensorError as error:
            # The library wraps what the system said, of a full disk for one; give the system's own error back.
            code = re.search(r"os error (\d+)", str(error))
            number = int(code[1]) if code else errno.EIO
            raise OSError(number, os.strerror(number), str(path)) from error
