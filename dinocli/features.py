"""Features: the file between extraction and every evaluation."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from dinocli.atomic import atomic
from dinocli.errors import DinoError

FOLDER = Path("features")
_KINDS = {"float32": "F32", "int64": "I64", "uint8": "U8"}


@dataclass(frozen=True)
class Recipe:
    """What made some features; two splits can be compared only if this is equal.

    Attributes:
        source: Of the encoder, as the user named it.
        fingerprint: Of the encoder's weights.
        tokens: `cls`, `patches` or `cls+avg`.
        blocks: How many of the last blocks.
        size: Side of the images, in pixels.
        data: The folder the images came from.
    """

    source: str
    fingerprint: str
    tokens: str
    blocks: int
    size: int
    data: str


@dataclass(frozen=True)
class Features:
    """Features of S images.

    Attributes:
        values: [S, D], or [S, N, D] for patch tokens; float32.
        labels: Index into `classes`, -1 where there is none. [S]
        paths: Of the images, below the data folder's split. [S]
        classes: Names of the classes; none for unlabelled images.
        skipped: Path and reason of each file that could not be read.
        recipe: What made them.
    """

    values: NDArray[np.float32]
    labels: NDArray[np.int64]
    paths: list[str]
    classes: list[str]
    skipped: dict[str, str]
    recipe: Recipe

    def __len__(self) -> int:
        return len(self.values)


class FeatureWriter:
    """Takes features row by row; `write_features` gives one.

    Attributes:
        labels: Of the rows so far; the caller adds to it, as to the two below.
        paths: Of the rows so far.
        skipped: Path and reason of each file that could not be read.
    """

    def __init__(self, file: BinaryIO, recipe: Recipe, classes: Sequence[str]) -> None:
        self._file = file
        self._metadata = {
            "dinocli": "features",
            "recipe": json.dumps(vars(recipe)),
            "classes": json.dumps(list(classes)),
        }
        # A safetensors file opens with a header that holds every tensor's shape, and these are known at the end alone:
        # room is left for it, and padded with spaces, as the format allows.
        self._room = len(json.dumps({"__metadata__": self._metadata})) + 1024
        self._room += -self._room % 8  # so that what follows is aligned
        self._row: tuple[int, ...] = (0,)
        self._rows = 0
        self.labels: list[int] = []
        self.paths: list[str] = []
        self.skipped: dict[str, str] = {}
        file.write(b" " * (8 + self._room))

    def append(self, values: NDArray[np.float32]) -> None:
        """Add rows. [B, ...]"""
        self._row = values.shape[1:]
        self._rows += len(values)
        self._file.write(np.ascontiguousarray(values, dtype="<f4").tobytes())

    def finish(self) -> None:
        """Write what follows the rows, and then the header."""
        end = self._file.tell() - 8 - self._room
        header: dict[str, Any] = {"__metadata__": self._metadata}
        header["values"] = {"dtype": "F32", "shape": [self._rows, *self._row], "data_offsets": [0, end]}
        tail = {
            # A header is capped at 100 MB, which a million paths would pass: they are a tensor of bytes.
            "labels": np.array(self.labels, dtype="<i8"),
            "paths": np.frombuffer("\0".join(self.paths).encode("utf-8", "surrogateescape"), dtype=np.uint8),
            "skipped": np.frombuffer(json.dumps(self.skipped).encode(), dtype=np.uint8),
        }
        # labels come first of the three: int64 is to begin at a multiple of eight, which rows of float32 may miss.
        if end % 8:
            self._file.write(b"\0" * 4)
            header["padding"] = {"dtype": "U8", "shape": [4], "data_offsets": [end, end + 4]}
            end += 4
        for name, array in tail.items():
            self._file.write(array.tobytes())
            stop = end + array.nbytes
            header[name] = {"dtype": _KINDS[array.dtype.name], "shape": list(array.shape), "data_offsets": [end, stop]}
            end = stop
        text = json.dumps(header).encode()
        self._file.seek(0)
        self._file.write(struct.pack("<Q", self._room) + text.ljust(self._room))


@contextmanager
def write_features(path: Path, recipe: Recipe, classes: Sequence[str]) -> Iterator[FeatureWriter]:
    """Write a feature file in constant memory; it appears at `path` when the block ends well, and else not at all."""
    with atomic(path) as draft, draft.open("wb") as file:
        writer = FeatureWriter(file, recipe, classes)
        yield writer
        writer.finish()


def read_features(path: Path) -> Features:
    """Read a feature file.

    Raises:
        DinoError: There is none, it is damaged, or it is another kind of file.
    """
    if not path.is_file():
        raise DinoError(
            f"a feature file was wanted; {path} does not exist", "make one with `dino extract CHECKPOINT DATA`"
        )
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("dinocli") != "features":
                raise DinoError(f"{path} holds no features", "make some with `dino extract CHECKPOINT DATA`")
            text = {
                name: file.get_tensor(name).tobytes().decode("utf-8", "surrogateescape")
                for name in ("paths", "skipped")
            }
            values, labels = file.get_tensor("values"), file.get_tensor("labels")
    except SafetensorError as error:
        raise DinoError(f"{path} is damaged: {error}", "make it again with `dino extract CHECKPOINT DATA`") from error
    paths = text["paths"].split("\0") if len(values) else []
    return Features(
        values,
        labels,
        paths,
        json.loads(metadata["classes"]),
        json.loads(text["skipped"]),
        Recipe(**json.loads(metadata["recipe"])),
    )


def read_splits(folder: Path) -> dict[str, Features]:
    """All feature files of a folder by their split's name, after a check that they belong together.

    Raises:
        DinoError: There is none, or they were made by different weights, settings or data.
    """
    paths = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if not paths:
        came = "holds none" if folder.is_dir() else "does not exist"
        raise DinoError(
            f"a folder with features was wanted; {folder} {came}", "make some with `dino extract CHECKPOINT DATA`"
        )
    found = {path.stem: read_features(path) for path in paths}
    first_name, first = next(iter(found.items()))
    for name, other in found.items():
        for field, what in (
            ("fingerprint", "weights"),
            ("tokens", "tokens"),
            ("blocks", "blocks"),
            ("size", "image sizes"),
            ("data", "data sets"),
        ):
            a, b = getattr(first.recipe, field), getattr(other.recipe, field)
            if a != b:
                if field == "fingerprint":
                    a, b = f"{first.recipe.source} ({a})", f"{other.recipe.source} ({b})"
                raise DinoError(
                    f"{folder} holds features made by different {what}: {first_name} by {a}, {name} by {b}",
                    f"extract into a folder of its own (--out), or remove {folder / first_name}.safetensors if old",
                )
    return found


def compared(splits: dict[str, Features]) -> tuple[Features, Features | None]:
    """The labelled split to learn from, and the one to measure on; absent where there is one labelled split alone.

    Raises:
        DinoError: No split has labels, they hold patch tokens, or the two have no class in common.
    """
    labelled = {name: f for name, f in splits.items() if f.classes}
    if not labelled:
        raise DinoError(
            "labelled features were wanted; these images lie in no class folders",
            "put each class in a folder of its own (data/cat/1.jpg, data/dog/2.jpg) and extract again",
        )
    if any(f.values.ndim != 2 for f in labelled.values()):
        raise DinoError("one feature an image was wanted; these are patch tokens", "extract again with --tokens cls")
    train = labelled.get("train") or next(iter(labelled.values()))
    test = next((labelled[name] for name in ("val", "test") if name in labelled and labelled[name] is not train), None)
    if test is not None:
        test = _with_classes_of(train, test)
    return train, test


def _with_classes_of(train: Features, test: Features) -> Features:
    """The test features with labels that count in the training split's classes."""
    index = {name: i for i, name in enumerate(train.classes)}
    unknown = [name for name in test.classes if name not in index]
    if unknown:
        raise DinoError(
            f"the class {unknown[0]} of the test split is not in the training split",
            "give both splits the same class folders",
        )
    translate = np.array([index[name] for name in test.classes])
    return Features(test.values, translate[test.labels], test.paths, train.classes, test.skipped, test.recipe)
