"""Training states: one folder per saved step, with everything needed to resume."""

from __future__ import annotations

import os
import re
import shutil
import stat
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dinocli.core.atomic import atomic, atomic_folder, write_json
from dinocli.core.checksums import KEY, crc_of_file, parse, unseal
from dinocli.core.config import Config
from dinocli.core.distributed import rank
from dinocli.core.drafts import discard, sweep
from dinocli.core.errors import DinoError
from dinocli.core.runs import CHECKPOINT
from dinocli.core.tensors import load_tensors, write_tensors
from dinocli.core.version import __version__
from dinocli.data.sources.open import Source
from dinocli.data.sources.parts import part_of
from dinocli.data.sources.shards import Shards
from dinocli.data.sources.tar import is_stream
from dinocli.engine.checkpoint import restore, state_of
from dinocli.engine.trainer import Trainer
from dinocli.method.preset import Preset
from dinocli.models.network import Network
from dinocli.weights.checkpoint import refuse_not_finite, write_checkpoint

FOLDER = "state"
_SAMPLED = 200  # files whose contents are checked
_PIECE = 1 << 18  # bytes per checked piece of a large file
_TRAINER = "trainer.safetensors"
_STATE = "state.json"


class ImageFacts(Config):
    """Identity of the images that a run trains on.

    Attributes:
        where: Location of the images, as the user named it.
        count: Number of images, or None if unknown.
        fingerprint: Fingerprint of the image names in order.
        contents: Checksums of a sample of the files, from `sample_of`. Empty in states of earlier versions.
    """

    where: str
    count: int | None
    fingerprint: str
    contents: str = ""


class StageFacts(Config):
    """Earlier stage of a run, which the next one continued.

    Attributes:
        source: Run folder, state or checkpoint, as the user named it.
        recipe: Recipe in a few words.
        steps: Steps done in that stage.
        batch_size: Images per step.
        lr: Highest learning rate of its preset, before `lr_rule`.
        images: Location of its images; empty if unknown.
        optimizer: True if the next stage continued the optimizer's state too.
    """

    source: str
    recipe: str
    steps: int
    batch_size: int
    lr: float
    images: str = ""
    optimizer: bool


class State(Config):
    """Metadata of a training state.

    Attributes:
        step: Number of completed steps.
        stop: Number of planned steps.
        early: True if the run ended before them because its score no longer rose.
        preset: Resolved preset of the run.
        images: Identity of the training images.
        init: Initial weights, as the user named them.
        teacher: Fingerprint of the frozen teacher, if any.
        stages: Earlier stages that the run continues, oldest first.
        lanes: Number of processes that read images. It determines the image order of tar shards.
        files: Checksum of each other file in the state's folder, by name.
        dinocli: Version that wrote the state.
    """

    step: int
    stop: int
    early: bool = False
    preset: Preset
    images: ImageFacts
    init: str | None
    teacher: str | None = None
    stages: tuple[StageFacts, ...] = ()
    lanes: int
    files: dict[str, int] = {}
    dinocli: str = __version__


@dataclass(frozen=True)
class SavedState:
    """Valid training state on disk.

    Attributes:
        state: Metadata of the state.
        folder: Folder of the state.
    """

    state: State
    folder: Path

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the trainer.

        Raises:
            DinoError: If values are not finite.
            KeyError: If the file is corrupt.
        """
        tensors = _read(self.folder / _TRAINER)
        refuse_not_finite(tensors, str(self.folder))
        return tensors

    def restore(self, trainer: Trainer) -> None:
        """Load the state into a trainer of the same preset.

        Raises:
            DinoError: If tensors are missing, shapes differ, or values are not finite.
        """
        try:
            restore(trainer, self.tensors())
        except (KeyError, RuntimeError) as error:
            raise DinoError(
                f"the state in {self.folder} does not fit this preset: {str(error).splitlines()[0]}",
                "use the version of dinocli that wrote it, or start again with another --out",
            ) from error


def saved_states(run: Path) -> Iterator[tuple[Path, State | None]]:
    """Yield the folder of each state, newest first, with its metadata, or None if that is corrupt.

    Other files are not checked.
    """
    for folder in _folders(run):
        try:
            yield folder, State.parse(unseal((folder / _STATE).read_bytes()), str(folder))
        except (OSError, ValueError, DinoError):
            yield folder, None


def read_state(place: Path) -> SavedState | None:
    """Return the state in a folder, or the newest of a run folder; None if there is none. Change nothing.

    Raises:
        DinoError: If it is corrupt, or of a version that this one cannot read.
    """
    run = place if _folders(place) else place.parent.parent
    for folder, state in saved_states(run):
        if run == place or folder == place:
            if state and _is_valid(folder, state):
                return SavedState(state, folder)
            raise DinoError(
                f"the state in {folder} is corrupt, or of another version of dinocli",
                f"name an earlier state of {run}, or {run / CHECKPOINT} without its optimizer",
            )
    return None


def _is_valid(folder: Path, state: State) -> bool:
    return bool(state.files) and all(_checksum(folder / name) == known for name, known in state.files.items())


def _folders(run: Path) -> list[Path]:
    """Return the state folders of a run, newest first."""
    named = (path for path in (run / FOLDER).glob("*") if re.fullmatch("[0-9]+", path.name))
    return sorted(named, key=lambda path: int(path.name), reverse=True)


def newest(run: Path, note: Callable[[str], None]) -> SavedState | None:
    """Return the newest valid state; report and set aside corrupt newer ones.

    Raises:
        DinoError: If another version wrote a state that this one cannot read. That state is not set aside.
    """
    for folder, state in saved_states(run):
        writer = _writer(folder) if state is None else None
        if writer:
            raise DinoError(
                f"the state in {folder} was written by dinocli {writer}; dinocli {__version__} cannot read it",
                f"pip install dinocli=={writer}; or use another --out, and --init {run} to start from its weights",
            )
        if state and _is_valid(folder, state):
            return SavedState(state, folder)
        aside = folder.with_name(f"damaged-{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        then = "using the one before it" if _folders(run) else "there is none before it"
        note(f"note: the state of step {folder.name} is corrupt and was moved to {aside}; {then}")
    return None


def _writer(folder: Path) -> str | None:
    """Return the version that wrote an unreadable state, or None if the state is corrupt."""
    try:
        text = (folder / _STATE).read_bytes()
        found = parse(text)
        version = str(found["dinocli"])
    except (OSError, ValueError, LookupError, TypeError):
        return None
    if version != __version__:
        return version
    try:  # the same version from another commit
        return version if KEY in found and unseal(text) else None
    except ValueError:
        return None


class StateStore:
    """Writer of training states, which also deletes old ones.

    Args:
        run: Run folder, with the states in `state/STEP`.
        keep: Number of newest states to keep.
        milestones: Steps between states that are never deleted. If None, there are none.
    """

    def __init__(self, run: Path, keep: int, milestones: int | None) -> None:
        self.run, self.keep, self.milestones = run, keep, milestones
        if rank() == 0:
            sweep(run)
            sweep(run / FOLDER)

    def write(self, state: State, trainer: Trainer, checkpoint: Network) -> None:
        """Save a state atomically, update the run's checkpoint, and delete the oldest states.

        The first process writes. All processes must call this method, because sharded weights are gathered.

        Raises:
            OSError: If the disk is full or the folder is not writable. Earlier states are kept.
        """
        state_tensors, weights = state_of(trainer), checkpoint.weights()
        if rank() > 0:
            return
        folder = self.run / FOLDER / str(state.step)
        with atomic_folder(folder) as draft:
            write_checkpoint(draft / CHECKPOINT, weights, state.preset, state.step)
            tensors = {name: value.detach().cpu().numpy() for name, value in state_tensors.items()}
            write_tensors(draft / _TRAINER, tensors, {})
            files = {name: _checksum(draft / name) for name in (CHECKPOINT, _TRAINER)}
            write_json(draft / _STATE, state.model_copy(update={"files": files}).model_dump(mode="json"), indent=2)
        self._link_checkpoint(folder)
        self._prune()

    def repair(self, saved: SavedState) -> None:
        """Update the run's checkpoint if the process was killed after writing the state but before this update."""
        if _checksum(self.run / CHECKPOINT) != saved.state.files.get(CHECKPOINT):
            self._link_checkpoint(saved.folder)

    def _link_checkpoint(self, folder: Path) -> None:
        with atomic(self.run / CHECKPOINT) as draft:
            _link(folder / CHECKPOINT, draft)

    def _prune(self) -> None:
        for folder in _folders(self.run)[self.keep :]:
            if not (self.milestones and int(folder.name) and int(folder.name) % self.milestones == 0):
                discard(folder)


def sample_of(source: Source) -> str:
    """Return checksums of up to 200 image files or shards, eight hexadecimal digits each.

    The result is empty for pipes and for images that have no file of their own; the fingerprint of archives, packed
    pixels and shards at addresses depends on their contents already.
    """
    if isinstance(source, Shards):
        streamed = any(map(is_stream, source.urls))
        paths = [] if streamed else [source.urls[i] for i in _spread(len(source.urls))]
    elif source.in_files:
        paths = [_file_of(os.path.join(source.root, source.names[row])) for row in _spread(len(source))]
    else:
        return ""
    with ThreadPoolExecutor(8) as pool:  # for network file systems
        return "".join(pool.map(_content, paths))


def _spread(count: int) -> list[int]:
    """Return all indices below a count, or an evenly spaced sample of them. Saved checksums depend on this rule."""
    return [i * count // min(count, _SAMPLED) for i in range(min(count, _SAMPLED))]


def _file_of(path: str) -> str:
    """Return the file that holds an image; a part of a file, such as a page, has a name of its own."""
    part = part_of(path)
    return path if part is None or os.path.exists(path) else part.file


def _content(path: str) -> str:
    """Return a checksum of a file's size and contents. Of a large file, read only the beginning, middle and end."""
    try:
        info = os.stat(path)
        if not stat.S_ISREG(info.st_mode):  # opening a pipe would wait for its writer
            return f"{0:08x}"
        total = zlib.crc32(str(info.st_size).encode())
        with open(path, "rb", buffering=0) as file:
            large = info.st_size > 4 * _PIECE
            for begin in (0, info.st_size // 2, info.st_size - _PIECE) if large else (0,):
                file.seek(begin)
                total = zlib.crc32(file.read(_PIECE if large else 4 * _PIECE), total)
    except OSError:
        return f"{0:08x}"
    return f"{total:08x}"


def other_contents(before: str, source: Source) -> str | None:
    """Return a note if sampled files have changed since their checksums were taken, else None."""
    now = sample_of(source) if before else ""
    pairs = [(before[i : i + 8], now[i : i + 8]) for i in range(0, len(before), 8)]
    changed = sum(was != is_now for was, is_now in pairs)
    if not changed or len(before) != len(now):  # a changed number of files is reported elsewhere
        return None
    kind = "shards" if isinstance(source, Shards) else "images"
    return f"note: {changed} of {len(pairs)} sampled {kind} have changed since this run began"


def _link(source: Path, path: Path) -> None:
    try:
        os.link(source, path)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, path)


def _checksum(path: Path) -> int:
    """Return the checksum of a file, or -1 if it cannot be read."""
    try:
        return crc_of_file(path)
    except OSError:
        return -1


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_tensors(path)[0]
    except ValueError as error:
        raise KeyError(str(error)) from error
