"""Run folders: names of their files, the next free one, the newest run, and the link to its weights."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dinocli.core.drafts import drafting
from dinocli.core.errors import DinoError
from dinocli.core.locks import Lock, lock

RUNS = Path("runs")
CHECKPOINT = "ckpt.safetensors"
METRICS, CURVES, REPORT, STAGES = "metrics.jsonl", "curves.png", "report.html", "stages.json"
VERDICT = "verdict.json"


def runs_of(preset: str) -> list[Path]:
    """Return the folders `runs/<preset>-<n>`, the highest number first."""
    tails = {path.name.removeprefix(f"{preset}-"): path for path in RUNS.glob(f"{glob.escape(preset)}-*")}
    numbers = {int(tail): path for tail, path in tails.items() if tail.isdecimal()}
    return [numbers[n] for n in sorted(numbers, reverse=True)]


def next_folder(preset: str) -> Path:
    """Return the first `runs/<preset>-<n>` after all existing ones."""
    last = int(runs_of(preset)[0].name.removeprefix(f"{preset}-")) if runs_of(preset) else 0
    return RUNS / f"{preset}-{last + 1}"


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Lock a run folder for this process; create it if it is missing, and then remove it if it stays empty.

    Raises:
        DinoError: If another process is using the folder.
    """
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    folder_lock = _lock(folder)
    try:
        yield
    finally:
        if folder_lock is not None:
            folder_lock.close()
        with suppress(OSError):  # not empty
            for path in created:
                path.rmdir()


def _lock(folder: Path) -> Lock | None:
    try:
        return lock(folder)
    except BlockingIOError:
        raise DinoError(f"another run is using {folder}", "wait until it ends, or use another --out") from None
    except PermissionError:  # a folder that is writable but not readable
        return None


def is_held(folder: Path) -> bool:
    """Return whether a process, such as a running training, holds the lock of a run folder."""
    try:
        folder_lock = lock(folder)
    except BlockingIOError:
        return True
    except OSError:  # a folder that is not readable
        return False
    if folder_lock is not None:
        folder_lock.close()
    return False


def newest_run() -> Path | None:
    """Return the run folder whose checkpoint was written last; None if there is no run."""
    runs = [path for path in RUNS.glob("*") if (path / CHECKPOINT).is_file()]
    return max(runs, key=lambda path: (path / CHECKPOINT).stat().st_mtime, default=None)


def run_of(source: Path) -> str:
    """Return the run folder of a checkpoint, or "" if it belongs to no run.

    Links are followed. The path is relative if the folder is below the working directory.
    """
    checkpoint = (source / CHECKPOINT if source.is_dir() else source).resolve()
    if checkpoint.name != CHECKPOINT or checkpoint.parent == Path().resolve():
        return ""
    here = Path().resolve()
    return str(checkpoint.parent.relative_to(here) if here in checkpoint.parents else checkpoint.parent)


def link_newest(checkpoint: Path) -> bool:
    """Link `./ckpt.safetensors` to the newest weights; return False on failure, or if the user has a file there."""
    link = Path(CHECKPOINT)
    if link.exists() and not link.is_symlink():
        return link.resolve() == checkpoint.resolve()
    try:
        with drafting(link) as draft:
            try:
                # Relative to the link's final folder, not to the draft.
                draft.symlink_to(os.path.relpath(checkpoint))
            except (OSError, ValueError):  # file systems without links, and Windows without the right to create one
                shutil.copyfile(checkpoint, draft)
            draft.replace(link)
    except OSError:  # an unwritable folder or a full disk does not harm the run
        return False
    return True
