"""Files that are whole or not there: written beside their place, synced, and renamed into it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


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
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    # The rename itself is durable only once the folder is synced (Windows cannot open one, and needs it not).
    with contextlib.suppress(PermissionError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with atomic(path) as draft:
        draft.write_text(text, encoding="utf-8")
