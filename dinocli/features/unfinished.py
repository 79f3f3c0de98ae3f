"""Unfinished extractions: a folder that survives a kill, from which the same extraction resumes."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dinocli.core.atomic import write_json
from dinocli.core.checksums import unseal
from dinocli.core.drafts import name_user_path
from dinocli.core.runs import held

Job = Mapping[str, Any]
_PROGRESS = "progress.json"
_COMPLETE = "complete"


class Unfinished:
    """Folder of an unfinished extraction, next to its output.

    Args:
        folder: Folder for the unfinished files.
        job: Everything that decides the bytes of the output, as JSON: weights, images, options.

    Attributes:
        state: State that the interrupted extraction saved last. If None, the extraction is new.
    """

    def __init__(self, folder: Path, job: Job) -> None:
        self.folder = folder
        self.state: dict[str, Any] | None = None
        self._job = json.loads(json.dumps(job))

    def save(self, state: Mapping[str, Any]) -> None:
        """Save a state from which the extraction can resume; its files must be synced before."""
        write_json(self.folder / _PROGRESS, {"job": self._job, "state": state})

    def read(self) -> str:
        """Read the saved state into `state`; return the reason why it cannot be used, or an empty string.

        A state of another job is not used.
        """
        try:
            saved = unseal((self.folder / _PROGRESS).read_bytes())
            before, state = dict(saved["job"]), dict(saved["state"])
        except FileNotFoundError:
            return ""
        except (OSError, ValueError, LookupError, TypeError):
            return "is damaged: its progress cannot be read"
        if changed := differences(before, self._job):
            return f"has {changed}"
        self.state = state
        return ""

    def clear(self) -> None:
        """Remove all files."""
        self.state = None
        (self.folder / _PROGRESS).unlink(missing_ok=True)  # first: without it, the other files are never used
        for path in self.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    @property
    def resumable(self) -> bool:
        """True if a state is saved."""
        return (self.folder / _PROGRESS).exists()


@contextlib.contextmanager
def unfinished(path: Path, job: Job, say: Callable[[str], None]) -> Iterator[Unfinished]:
    """Yield the folder of an extraction's unfinished files, with the state of an interrupted one with the same job.

    The folder is locked, and removed at the end. It stays if this process is killed or fails after a state was saved.

    Args:
        path: Output of the extraction.
        job: Everything that decides the bytes of the output, as JSON.
        say: Callback that receives one-line messages for the user.

    Raises:
        DinoError: If another process is writing the same output.
        OSError: If the disk is full or the place is not writable. The error names `path`.
    """
    folder = _folder_of(path)
    with name_user_path(path, folder), contextlib.ExitStack() as last:
        last.callback(_remove_empty, folder)
        with held(folder):
            work = Unfinished(folder, job)
            if reason := work.read():
                say(f"note: starting anew: the unfinished extraction in {folder} {reason}")
            if work.state is None:
                work.clear()
            try:
                yield work
            except BaseException:
                if work.resumable:
                    say(f"unfinished: run the same command to resume; until then, {folder} holds the features so far")
                else:
                    work.clear()
                raise
            work.clear()


def record(path: Path, job: Job, result: Mapping[str, Any]) -> None:
    """Record the result of a complete extraction, so that an interrupted command of several does not repeat it."""
    folder = _folder_of(path)
    folder.mkdir(exist_ok=True)
    Unfinished(folder, job).save({_COMPLETE: result})


def recorded(path: Path, job: Job) -> dict[str, Any] | None:
    """Return the recorded result of an extraction with the same job, or None."""
    work = Unfinished(_folder_of(path), job)
    work.read()
    return (work.state or {}).get(_COMPLETE)


def forget(path: Path) -> None:
    """Remove the record of a complete extraction, if there is one."""
    shutil.rmtree(_folder_of(path), ignore_errors=True)


def _folder_of(path: Path) -> Path:
    return path.with_name(f".{path.stem}.unfinished")


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def differences(one: Job, other: Job) -> str:
    """Return "other" and the names of the values in which two jobs differ, or an empty string."""
    names = [name for name in sorted({*one, *other}) if one.get(name) != other.get(name)]
    return f"other {', '.join(names)}" if names else ""
