"""Where runs lie: the next free folder, the newest run, and the link to its weights."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

RUNS = Path("runs")
CHECKPOINT = "ckpt.safetensors"


def next_folder(preset: str) -> Path:
    """The first `runs/<preset>-<n>` after all that exist."""
    taken = [int(tail) for path in RUNS.glob(f"{preset}-*") if (tail := path.name.removeprefix(f"{preset}-")).isdigit()]
    return RUNS / f"{preset}-{max(taken, default=0) + 1}"


def newest_run() -> Path | None:
    """The run folder whose checkpoint was written last."""
    found = [path for path in RUNS.glob("*") if (path / CHECKPOINT).is_file()]
    return max(found, key=lambda path: (path / CHECKPOINT).stat().st_mtime, default=None)


def link_newest(checkpoint: Path) -> bool:
    """Let `./ckpt.safetensors` be the newest weights; false where a file of the user's own stands there."""
    link = Path(CHECKPOINT)
    if link.exists() and not link.is_symlink():
        return link.resolve() == checkpoint.resolve()
    draft = Path(f".{CHECKPOINT}.{os.getpid()}.part")
    try:
        draft.symlink_to(os.path.relpath(checkpoint))
    except (OSError, ValueError):  # file systems without links, and Windows without the right to make one
        shutil.copyfile(checkpoint, draft)
    draft.replace(link)
    return True
