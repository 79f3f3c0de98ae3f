"""Writing of features to a file or to shards, in constant memory."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dinocli.core.atomic import atomic, draft_folder, put_folder, write_json
from dinocli.core.drafts import discard
from dinocli.core.errors import DinoError
from dinocli.core.tensors import TensorStream
from dinocli.features.store import COUNTS, INDEX, PART, Provenance
from dinocli.features.unfinished import Job, Unfinished, unfinished

SHARD_BYTES = 2 * 2**30  # maximum size of the features in one file
_SAVE_EVERY = 30.0  # seconds; an interrupted extraction repeats at most this much
Dtype = Literal["float32", "float16"]


class Part(NamedTuple):
    """Part `number`, from 1, of `of` parts of an extraction: every `of`-th batch."""

    number: int
    of: int


WHOLE = Part(1, 1)


class FeatureWriter:
    """Writer of features, batch by batch and in constant memory; `write_features` creates it.

    Args:
        draft: Folder to write in.
        place: Feature file to write.
        metadata: Metadata of every file.
        dtype: Type of the stored numbers.
        shard_bytes: Maximum size of the features in one file, in bytes.
        state: Result of `save` of an earlier writer, to continue after its batches. If None, the writer is new.
        counted: Store the number of rows and of skipped files of each batch, which joining parts needs.
        keep: Callback that receives the state about every 30 seconds. If None, no state is saved.

    Attributes:
        place: Feature file, or folder of shards for large features.
        skipped: Path and reason of each file that could not be read. The caller adds them.
        images: Number of rows in each shard, by file name.
        batches: Number of complete batches.
        unnumbered: Number of labels that were not stored. The caller counts them.
        shape: Shape of a row; empty without rows.
    """

    def __init__(
        self,
        draft: Path,
        place: Path,
        metadata: dict[str, str],
        dtype: Dtype,
        shard_bytes: int,
        state: Mapping[str, Any] | None = None,
        *,
        counted: bool = False,
        keep: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.place = place
        self.skipped: dict[str, str] = {}
        self.images: dict[str, int] = {}
        self.batches = self.unnumbered = 0
        self.shape: tuple[int, ...] = ()
        self._draft, self._dtype, self._shard_bytes, self._bytes = draft, dtype, shard_bytes, 0
        self._names = ("values", "labels", "paths", *([COUNTS] if counted else []), "skipped")
        self._metadata, self._counted = metadata, counted
        self._keep, self._saved = keep, time.monotonic()
        self._rows = self._bad = 0  # rows and skipped files of all complete batches
        if state:
            self._continue(state)
        else:
            self._open(np.empty((0, 0), dtype))

    def _continue(self, state: Mapping[str, Any]) -> None:
        self.skipped, self.images, self.shape = dict(state["skipped"]), dict(state["images"]), tuple(state["shape"])
        self.batches, self.unnumbered, self._bytes = state["batches"], state["unnumbered"], state["bytes"]
        self._rows, self._bad = self.rows, len(self.skipped)
        *complete, self._name = self.images
        if missing := [name for name in complete if not (self._draft / name).exists()]:
            raise ValueError(f"{missing[0]} is missing")
        self._stream = TensorStream(self._draft / self._name, self._names, self._metadata, state["stream"])

    def save(self) -> dict[str, Any]:
        """Sync all batches so far to disk; return the state, as JSON, from which another writer can continue."""
        return {
            "skipped": self.skipped,
            "images": self.images,
            "shape": self.shape,
            "batches": self.batches,
            "unnumbered": self.unnumbered,
            "bytes": self._bytes,
            "stream": self._stream.save(),
        }

    @property
    def rows(self) -> int:
        """Number of rows."""
        return sum(self.images.values())

    def append(self, values: NDArray[np.float32], labels: Sequence[int], paths: Sequence[str]) -> None:
        """Add a batch.

        Args:
            values: Features. [B, ...]
            labels: Class indices, or -1 without a label. [B]
            paths: Image paths. [B]

        Raises:
            DinoError: If a value is not finite or too large for float16, or if the folder for shards already holds
                other files.
        """
        if not np.isfinite(values).all():
            raise DinoError(
                f"the features of {paths[0]} or of later images in its batch are not finite",
                "use another checkpoint, or skip these images",
            )
        with np.errstate(over="ignore"):
            rows = values.astype(self._dtype, copy=False)
        if self._dtype == "float16" and np.isinf(rows).any():
            raise DinoError(
                f"a feature of {np.abs(values).max():.0f} exceeds float16's maximum of 65504", "--dtype float32"
            )
        if self._bytes and self._bytes + rows.nbytes > self._shard_bytes:
            if in_the_way(_folder_of(self.place)):
                raise DinoError(
                    f"features above {self._shard_bytes / 2**30:g} GiB are written as a folder of shards; "
                    f"{_folder_of(self.place)} already exists with other contents",
                    "choose another folder with --out",
                )
            self._end()
            self._open(rows[:0])
        self._bytes += rows.nbytes
        self._stream.append("values", rows)
        self._stream.append("labels", np.array(labels, dtype=np.int64))
        # Paths are stored as a tensor of bytes: in the header, a million paths would exceed its limit of 100 MB.
        text = "\0".join(paths).encode("utf-8", "surrogateescape")
        if self.images[self._name]:
            text = b"\0" + text
        self._stream.append("paths", np.frombuffer(text, dtype=np.uint8))
        self.images[self._name] += len(rows)
        self.shape = rows.shape[1:]

    def end_batch(self, batches: int) -> None:
        """Record that the first `batches` batches are complete; some of them may be empty."""
        self.batches = batches
        if self._counted:
            counts = [self.rows - self._rows, len(self.skipped) - self._bad]
            self._stream.append(COUNTS, np.array([counts], np.int64))
            self._rows, self._bad = self.rows, len(self.skipped)
        if self._keep and time.monotonic() - self._saved >= _SAVE_EVERY:
            self._keep(self.save())
            self._saved = time.monotonic()

    def finish(self) -> None:
        """Write the skipped files after the last row."""
        self._end(self.skipped)

    def close(self) -> None:
        self._stream.close()

    def _open(self, nothing: NDArray[Any]) -> None:
        self._name = f"{len(self.images):05}.safetensors"
        self.images[self._name] = self._bytes = 0
        self._stream = TensorStream(self._draft / self._name, self._names, self._metadata)
        self._stream.append("values", nothing)
        self._stream.append("labels", np.empty(0, np.int64))
        self._stream.append("paths", np.empty(0, np.uint8))
        if self._counted:
            self._stream.append(COUNTS, np.empty((0, 2), np.int64))

    def _end(self, skipped: dict[str, str] | None = None) -> None:
        self._stream.append("skipped", np.frombuffer(json.dumps(skipped or {}).encode(), dtype=np.uint8))
        self._stream.finish()
        self._stream.close()


@contextmanager
def write_features(
    path: Path,
    provenance: Provenance,
    classes: Sequence[str],
    *,
    dtype: Dtype = "float32",
    shard_bytes: int = SHARD_BYTES,
    part: Part = WHOLE,
    job: Job | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[FeatureWriter]:
    """Write features in constant memory; the files appear only if the block succeeds.

    Features up to `shard_bytes` are written to a file at `path`. Larger ones are written to a folder of shards and an
    index; its name is `path` without the suffix. An earlier file or folder of features with that name is removed.

    Args:
        path: Output file, with its suffix.
        provenance: Origin and settings of the features.
        classes: Names of the classes; empty for unlabelled images.
        dtype: Type of the stored numbers.
        shard_bytes: Maximum size of the features in one file, in bytes. A single batch may exceed it.
        part: Part of the features that is written. A part also stores its number, the job and the size of each batch.
        job: Everything that decides the bytes of the output. If the block is interrupted, the next one with the same
            job continues after the batches that were saved. If None, it leaves nothing.
        say: Callback that receives one-line messages for the user.
    """
    folder = _folder_of(path)
    metadata = {"dinocli": "features", "recipe": json.dumps(vars(provenance)), "classes": json.dumps(list(classes))}
    if part != WHOLE:
        metadata[PART] = json.dumps({**part._asdict(), "job": job})
    with ExitStack() as stack:
        work = None if job is None else stack.enter_context(unfinished(path, {**job, "part": part}, say))
        draft = work.folder if work else stack.enter_context(draft_folder(folder))
        make = partial(FeatureWriter, draft, path, metadata, dtype, shard_bytes, counted=part != WHOLE)
        writer = stack.enter_context(closing(_resume(make, work, say) if work else make()))
        yield writer
        writer.finish()
        if len(writer.images) == 1:
            with atomic(path) as whole:
                (draft / next(iter(writer.images))).rename(whole)
            if folder.exists() and not in_the_way(folder):
                discard(folder)
        else:
            with draft_folder(folder) as shards:
                for name in writer.images:
                    (draft / name).rename(shards / name)
                write_json(shards / INDEX, {"dinocli": "features", "images": writer.images})
                put_folder(shards, folder)
            path.unlink(missing_ok=True)
            writer.place = folder


def _resume(make: Callable[..., FeatureWriter], work: Unfinished, say: Callable[[str], None]) -> FeatureWriter:
    """Return a writer that continues after the saved batches, or a new one if there are none or they are damaged."""
    if work.state:
        try:
            writer = make(work.state, keep=work.save)
        except (OSError, ValueError, LookupError, TypeError) as error:
            say(f"note: starting anew: the unfinished extraction in {work.folder} is damaged: {error}")
            work.clear()
        else:
            say(f"resuming after {writer.rows + len(writer.skipped):,} images")
            return writer
    return make(keep=work.save)


def _folder_of(path: Path) -> Path:
    return path.with_suffix("")


def in_the_way(folder: Path) -> bool:
    """Return True if the path exists and must not be replaced, because it is not a folder of feature shards."""
    if not os.path.lexists(folder):
        return False
    return (
        folder.is_symlink()
        or not (folder / INDEX).is_file()
        or any(p.name != INDEX and not re.fullmatch(r"[0-9]{5}\.safetensors", p.name) for p in folder.iterdir())
    )
