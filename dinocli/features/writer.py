"""Writing of features to a file or to shards, in constant memory."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dinocli.core.atomic import atomic, draft_folder, put_folder, write_json
from dinocli.core.drafts import discard
from dinocli.core.errors import DinoError
from dinocli.core.tensors import TensorStream
from dinocli.features.store import INDEX, Provenance

SHARD_BYTES = 2 * 2**30  # maximum size of the features in one file
Dtype = Literal["float32", "float16"]


class FeatureWriter:
    """Writer of features, batch by batch and in constant memory; `write_features` creates it.

    Attributes:
        place: Feature file, or folder of shards for large features.
        skipped: Path and reason of each file that could not be read. The caller adds them.
        images: Number of rows in each shard, by file name.
    """

    def __init__(
        self, draft: Path, place: Path, provenance: Provenance, classes: Sequence[str], dtype: Dtype, shard_bytes: int
    ) -> None:
        self.place = place
        self.skipped: dict[str, str] = {}
        self.images: dict[str, int] = {}
        self._draft, self._dtype, self._shard_bytes, self._bytes = draft, dtype, shard_bytes, 0
        self._metadata = {
            "dinocli": "features",
            "recipe": json.dumps(vars(provenance)),
            "classes": json.dumps(list(classes)),
        }
        self._open(np.empty((0, 0), dtype))

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

    def finish(self) -> None:
        """Write the skipped files after the last row."""
        self._end(self.skipped)

    def close(self) -> None:
        self._stream.close()

    def _open(self, nothing: NDArray[Any]) -> None:
        self._name = f"{len(self.images):05}.safetensors"
        self.images[self._name] = self._bytes = 0
        self._stream = TensorStream(self._draft / self._name, ("values", "labels", "paths", "skipped"), self._metadata)
        for name, empty in (("values", nothing), ("labels", np.empty(0, np.int64)), ("paths", np.empty(0, np.uint8))):
            self._stream.append(name, empty)

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
    """
    folder = _folder_of(path)
    with draft_folder(folder) as draft:
        writer = FeatureWriter(draft, path, provenance, classes, dtype, shard_bytes)
        with closing(writer):
            yield writer
            writer.finish()
        if len(writer.images) == 1:
            with atomic(path) as whole:
                (draft / next(iter(writer.images))).rename(whole)
            if folder.exists() and not in_the_way(folder):
                discard(folder)
        else:
            write_json(draft / INDEX, {"dinocli": "features", "images": writer.images})
            put_folder(draft, folder)
            path.unlink(missing_ok=True)
            writer.place = folder


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
