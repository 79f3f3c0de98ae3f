"""Where runs lie: the next free folder, the newest run, and the link to its weights."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dinocli.drafts import drafting
from dinocli.errors import DinoError
from dinocli.locks import Lock, lock

RUNS = Path("runs")
CHECKPOINT = "ckpt.safetensors"


def runs_of(preset: str) -> list[Path]:
    """The folders `runs/<preset>-<n>`, the last first."""
    tails = {path.name.removeprefix(f"{preset}-"): path for path in RUNS.glob(f"{glob.escape(preset)}-*")}
    numbers = {int(tail): path for tail, path in tails.items() if tail.isdecimal()}
    return [numbers[n] for n in sorted(numbers, reverse=True)]


def next_folder(preset: str) -> Path:
    """The first `runs/<preset>-<n>` after all that exist."""
    last = int(runs_of(preset)[0].name.removeprefix(f"{preset}-")) if runs_of(preset) else 0
    return RUNS / f"{preset}-{last + 1}"


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep a run folder, which is made where it is missing, for this process; left empty, it is taken away again.

    Raises:
        DinoError: Another process is at work in it.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    held = _lock(folder)
    try:
        yield
    finally:
        if held is not None:
            held.close()
        with suppress(OSError):  # it holds something
            for path in made:
                path.rmdir()


def _lock(folder: Path) -> Lock | None:
    try:
        return lock(folder)
    except BlockingIOError:
        raise DinoError(f"a run is going on in {folder}", "let it end, or take another --out") from None
    except PermissionError:  # a folder that may be written to and not be read
        return None


def newest_run() -> Path | None:
    """The run folder whose checkpoint was written last."""
    found = [path for path in RUNS.glob("*") if (path / CHECKPOINT).is_file()]
    return max(found, key=lambda path: (path / CHECKPOINT).stat().st_mtime, default=None)


def link_newest(checkpoint: Path) -> bool:
    """Let `./ckpt.safetensors` be the newest weights; false where the user's own file stands there, or none may be."""
    link = Path(CHECKPOINT)
    if link.exists() and not link.is_symlink():
        return link.resolve() == checkpoint.resolve()
    try:
        with drafting(link) as draft:
            try:
                # Relative to the link's own place, not to the draft's.
                draft.symlink_to(os.path.relpath(checkpoint))
            except (OSError, ValueError):  # file systems without links, and Windows without the right to make one
                shutil.copyfile(checkpoint, draft)
            draft.replace(link)
    except OSError:  # a folder that may not be written to, or a full disk: the run is well all the same
        return False
    return True
