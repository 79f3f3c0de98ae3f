"""Feature files, which extraction writes and every evaluation reads."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dinocli.core.checksums import KEY, crc_of, crc_of_file, parse, unseal
from dinocli.core.errors import DinoError
from dinocli.core.tensors import Indices, Rows, Texts, Values, first_not_finite, map_tensors, read_metadata

if TYPE_CHECKING:
    from pandas import DataFrame

FOLDER = Path("features")
INDEX = "index.json"  # of a folder of shards
PART = "part"  # metadata of a part of an extraction
COUNTS = "batches"  # tensor of a part: number of rows and of skipped files of each batch [B, 2]
# Valid number types of each tensor in a file.
_KINDS = {"values": ("f4", "f2"), "labels": ("i8",), "paths": ("u1",), "skipped": ("u1",)}
_MOST_NUMBERED = 100_000  # labels below this count as class numbers; larger ones mean something else
# Valid types of a provenance's values in a file, by annotation; compared exactly, because a bool is also an int.
_TYPES: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "int | None": (int, NoneType)}


@dataclass(frozen=True)
class Provenance:
    """Origin and settings of features; splits can be compared only if their weights, settings and data are equal.

    Attributes:
        source: Source of the encoder's weights, as the user named it.
        fingerprint: Fingerprint of the encoder's weights.
        tokens: `cls`, `patches` or `cls+avg`.
        blocks: Number of last blocks whose tokens were used.
        size: Side of the images, in pixels.
        data: Folder of the images.
        views: Number of random views stored per image.
        precision: Precision of matrix products.
        run: Folder of the run that produced the weights, if any.
        step: Number of training steps, if the weights' file stores it.
    """

    source: str
    fingerprint: str
    tokens: str
    blocks: int
    size: int
    data: str
    views: int = 0
    precision: str = "float32"
    run: str = ""
    step: int | None = None

    @property
    def maker(self) -> str:
        """Source, run and step of the weights, for titles."""
        parts = [self.run if self.run != self.source else "", f"step {self.step}" if self.step is not None else ""]
        details = ", ".join(filter(None, parts))
        return f"{self.source} ({details})" if details else self.source


@dataclass(frozen=True)
class Features:
    """Features of S images.

    Attributes:
        values: Features, on disk until they are indexed, then float32. [S, D], or [S, N, D] for patch tokens
        labels: Index into `classes`, or -1 without a label. [S]
        paths: Image paths relative to the split's folder. [S]
        classes: Names of the classes; empty for unlabelled images.
        skipped: Path and reason of each file that could not be read.
        provenance: Origin and settings of the features.
        views: Features of random views of each image, if stored. [S, K, D]
        place: File or folder of shards that holds the features, if stored. It may hold unlabelled images too.
    """

    values: Values
    labels: NDArray[np.int64]
    paths: Sequence[str]
    classes: list[str]
    skipped: dict[str, str]
    provenance: Provenance
    views: Values | None = None
    place: Path | None = None

    def __len__(self) -> int:
        return len(self.values)

    def rows(self) -> Iterator[tuple[str, int | None, str | None]]:
        """Yield path, label and class name of each image; the last two are None without a label."""
        for path, label in zip(self.paths, self.labels.tolist(), strict=True):
            known = label >= 0
            yield path, label if known else None, self.classes[label] if known and self.classes else None

    def to_pandas(self) -> DataFrame:
        """Return a pandas table with the columns `path`, `label`, `class`, `split` and `feature`, all in memory.

        `feature` holds a float32 array per image, [D] or [N, D]. The split is empty for features that no file holds.

        Raises:
            DinoError: If pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise DinoError(
                "to_pandas needs the package pandas, which is not installed", "pip install pandas"
            ) from error
        table = pandas.DataFrame(self.rows(), columns=["path", "label", "class"]).astype({"label": "Int64"})
        table["split"] = self.place.stem if self.place else ""
        table["feature"] = list(self.values[:])
        return table


def read_features(path: Path) -> Features:
    """Open features without loading them into memory, and check once that all values are finite.

    Args:
        path: Feature file, or folder of shards.

    Raises:
        DinoError: If the file does not exist, is corrupt, is of another kind, or holds non-finite features.
    """
    if not path.exists():
        raise DinoError(f"{path} does not exist; expected features", "create them with `dino extract CHECKPOINT DATA`")
    if path.is_dir():
        shards = [_map_file(path / name, images) for name, images in _index(path).items()]
        if any(metadata != shards[0][1] for _, metadata in shards):
            raise _format_damage(path, "its shards come from different extractions")
    else:
        shards = [_map_file(path)]
    tensors, metadata = [tensors for tensors, _ in shards], shards[0][1]
    provenance, classes = read_provenance(path, metadata)
    skipped = [_check_parts(path, t, provenance, len(classes), tensors[0]) for t in tensors]
    _refuse_not_finite(path, tensors)
    values = [t["values"] for t in tensors]
    labels = np.concatenate([t["labels"] for t in tensors])
    return Features(
        Rows([v[:, 0] for v in values] if provenance.views else values),
        labels,
        Texts([t["paths"] for t in tensors if len(t["labels"])]),
        classes or _number_classes(labels),
        {name: reason for some in skipped for name, reason in some.items()},
        provenance,
        Rows([v[:, 1:] for v in values]) if provenance.views else None,
        path,
    )


def checksum_of(path: Path) -> str:
    """Return the checksum of a feature file, or of all files in a folder of shards; only their headers are read.

    Raises:
        DinoError: If there are no features, or their headers are corrupt.
    """
    if not path.exists():
        raise DinoError(f"{path} does not exist; expected features", "create them with `dino extract CHECKPOINT DATA`")
    files = [path / name for name in _index(path)] if path.is_dir() else [path]
    try:
        # Features of version 0.1 have no checksum in their header.
        stored = {file.name: read_metadata(file).get(KEY) or f"{crc_of_file(file):08x}" for file in files}
    except (OSError, ValueError) as error:
        raise _format_damage(path, str(error)) from error
    return f"{crc_of(stored):08x}"


_AGAIN = "recreate it with `dino extract CHECKPOINT DATA`"


def read_provenance(path: Path, metadata: dict[str, str], again: str = _AGAIN) -> tuple[Provenance, list[str]]:
    """Return the provenance of features, and the names of their classes.

    Args:
        path: File of the metadata.
        metadata: Metadata with the keys `recipe` and `classes`, each JSON.
        again: Hint of an error: how to write the file again.

    Raises:
        DinoError: If the metadata are corrupt, or of a later version.
    """
    known = {field.name: _TYPES[str(field.type)] for field in fields(Provenance)}
    try:
        recipe, classes = parse(metadata["recipe"]), parse(metadata["classes"])
        if not (isinstance(recipe, dict) and isinstance(classes, list) and all(isinstance(c, str) for c in classes)):
            raise ValueError("they have the wrong type")
        later = [name for name in recipe if name not in known]
        if later:
            raise DinoError(
                f"{path} was written by a later version of dinocli: its provenance has the unknown key {later[0]}",
                f"pip install --upgrade dinocli, or {again}",
            )
        wrong = [name for name, value in recipe.items() if type(value) not in known[name]]
        if wrong:
            raise ValueError(f"the provenance has {wrong[0]}={recipe[wrong[0]]!r}")
        return Provenance(**recipe), classes
    except (ValueError, KeyError, TypeError) as error:
        why = f"the key {error} is missing" if isinstance(error, KeyError) else str(error)
        raise _format_damage(path, f"its metadata cannot be read; {why}", again) from error


def provenance_at(path: Path) -> Provenance | None:
    """Return the provenance of the features of a split, in one file or a folder of shards; None without valid ones."""
    for place in (path, *sorted(path.with_suffix("").glob("*.safetensors"))[:1]):
        with contextlib.suppress(OSError, ValueError, DinoError):
            return read_provenance(place, read_metadata(place))[0]
    return None


def _check_parts(
    path: Path, tensors: dict[str, NDArray[Any]], provenance: Provenance, classes: int, first: dict[str, NDArray[Any]]
) -> dict[str, str]:
    """Check that the parts of a feature file fit together; return its skipped images.

    Raises:
        DinoError: If they do not, or a label is out of range.
    """
    for name, kinds in _KINDS.items():
        if name not in tensors or tensors[name].dtype.str[1:] not in kinds:
            raise _format_damage(path, f"its {name} are missing or of the wrong type")
    values, labels, paths = tensors["values"], tensors["labels"], tensors["paths"]
    if values.ndim not in (2, 3) or labels.ndim != 1 or len(values) != len(labels):
        rows = len(values) if values.ndim else 0
        raise _format_damage(path, f"it has {rows} rows of features and {labels.size} labels")
    if values.shape[1:] != first["values"].shape[1:]:
        shape, expected = ("x".join(map(str, v.shape[1:])) for v in (values, first["values"]))
        raise _format_damage(path, f"its rows have shape {shape}; expected {expected}")
    if provenance.views and (values.ndim != 3 or values.shape[1] != 1 + provenance.views):
        raise _format_damage(
            path,
            f"its rows have shape {'x'.join(map(str, values.shape[1:]))}, which does not fit {provenance.views} views",
        )
    named = int(np.count_nonzero(paths == 0)) + 1 if len(labels) else 0
    if named != len(labels):
        raise _format_damage(path, f"it has {len(labels)} labels and {named} paths")
    if len(labels) and (labels.min() < -1 or (classes and labels.max() >= classes)):
        wrong = int(labels.min() if labels.min() < -1 else labels.max())
        raise _format_damage(path, f"the label {wrong} is out of range: it has {classes} classes")
    try:
        skipped = parse(tensors["skipped"].tobytes())
        return {str(name): str(reason) for name, reason in skipped.items()}
    except (ValueError, AttributeError) as error:
        raise _format_damage(path, "its list of skipped images cannot be read") from error


def _number_classes(labels: NDArray[np.int64]) -> list[str]:
    """Return class names for labels that are only numbers, such as those of tar shards read through a pipe."""
    most = int(labels.max(initial=-1))
    return [str(i) for i in range(most + 1)] if most < _MOST_NUMBERED else []


def _refuse_not_finite(path: Path, shards: Sequence[dict[str, NDArray[Any]]]) -> None:
    before = 0
    for tensors in shards:
        values = tensors["values"]
        if found := first_not_finite(values):
            row, count = found
            raise DinoError(
                f"{path}: row {before + row} ({Texts([tensors['paths']])[row]}) holds {count} of {values[row].size} "
                "values that are not finite",
                "recreate it with `dino extract CHECKPOINT DATA`, which skips images without finite features",
            )
        before += len(values)


def _index(folder: Path) -> dict[str, int]:
    """Return the number of images in each shard of a folder, by file name."""
    splits = sorted(path for path in folder.glob("*.safetensors") if not path.stem.isdigit())
    if splits and not (folder / INDEX).exists():
        raise DinoError(f"{folder} is a folder of splits; expected the features of one split", f"use {splits[0]}")
    try:
        index = unseal((folder / INDEX).read_bytes())
        if index["dinocli"] != "features":
            raise DinoError(f"{folder} holds no features", "create them with `dino extract CHECKPOINT DATA`")
        shards = dict(index["images"].items())
        if not shards:
            raise ValueError("it lists no shards")
        for name, images in shards.items():
            if name != os.path.basename(name) or "\\" in name or not name.endswith(".safetensors"):
                raise ValueError(f"it lists {name}, which is not a file name in this folder")
            if not isinstance(images, int) or images < 0:
                raise ValueError(f"{images!r} is not a valid number of images for {name}")
        return shards
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        why = f": {error}" if isinstance(error, ValueError) else ""
        raise _format_damage(folder, f"its {INDEX} cannot be read{why}") from error


def _map_file(path: Path, images: int | None = None) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Return the tensors and metadata of a feature file; check its number of images if one is given."""
    if not path.exists():
        raise _format_damage(path.parent, f"{path.name} is missing")
    try:
        tensors, metadata = map_tensors(path)
    except (OSError, ValueError) as error:
        raise _format_damage(path, str(error)) from error
    if metadata.get("dinocli") != "features":
        raise DinoError(f"{path} holds no features", "create them with `dino extract CHECKPOINT DATA`")
    here = tensors["labels"].size if "labels" in tensors else 0
    if images not in (None, here):
        raise _format_damage(path, f"it has {here} images; expected {images}")
    return tensors, metadata


def _format_damage(path: Path, why: str, again: str = _AGAIN) -> DinoError:
    return DinoError(f"{path} is damaged: {why}", again)


def read_splits(folder: Path) -> dict[str, Features]:
    """Read all features of a folder by split name, and check that they belong together.

    Raises:
        DinoError: If there are none, their weights, settings or data differ, or a split exists twice.
    """
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    paths = {path.stem: path for path in files}
    for index in sorted(folder.glob(f"*/{INDEX}")):
        name = index.parent.name
        if name.startswith("."):  # unfinished files of a killed run
            continue
        if name in paths:
            raise DinoError(
                f"{folder} has both {paths[name].name} and the folder {name}; expected only one",
                "remove the older one, which a killed run may have left",
            )
        paths[name] = index.parent
    if not paths:
        fault = "holds no features" if folder.is_dir() else "is a file" if folder.exists() else "does not exist"
        raise DinoError(
            f"{folder} {fault}; expected a folder of features", f"dino extract CHECKPOINT IMAGES --out {folder.stem}"
        )
    found = {name: read_features(path) for name, path in sorted(paths.items())}
    first_name, first = next(iter(found.items()))
    for name, other in found.items():
        old = f"extract into another folder (--out), or remove {paths[first_name]} if outdated"
        same_maker((first_name, first.provenance), (name, other.provenance), f"{folder} holds features", old)
        if first.provenance.data != other.provenance.data:
            raise DinoError(
                f"{folder} holds features of different data sets: {first_name} of {first.provenance.data}, {name} of "
                f"{other.provenance.data}",
                old,
            )
    return found


def same_maker(
    first: tuple[str, Provenance],
    other: tuple[str, Provenance],
    whose: str = "features to compare are",
    hint: str = "extract both with the same checkpoint and the same settings",
) -> None:
    """Check that two sets of features have the same weights and settings; their images may differ.

    Args:
        first: Name and provenance of one set.
        other: Name and provenance of the other set.
        whose: Start of the error message, before "made with different".
        hint: Hint of the error: how to extract matching features.

    Raises:
        DinoError: If they differ.
    """
    for field, what in (
        ("fingerprint", "weights"),
        ("tokens", "tokens"),
        ("blocks", "blocks"),
        ("size", "image sizes"),
        ("precision", "precisions"),
    ):
        a, b = getattr(first[1], field), getattr(other[1], field)
        if a != b:
            if field == "fingerprint":
                a, b = f"{first[1].source} ({a})", f"{other[1].source} ({b})"
            raise DinoError(f"{whose} made with different {what}: {first[0]} with {a}, {other[0]} with {b}", hint)


def learned_from(splits: Iterable[str]) -> str:
    """Return the name of the split that a classifier learns from."""
    names = list(splits)
    return "train" if "train" in names else names[0]


def compared(splits: dict[str, Features]) -> tuple[Features, Features | None]:
    """Return the labelled split to learn from, and the labelled split to evaluate on, if there is one.

    Raises:
        DinoError: If no split has labels, the features are patch tokens, or a test class is not in the training split.
    """
    labelled = {name: _keep_labelled(f) for name, f in splits.items() if f.classes and (f.labels >= 0).any()}
    if not labelled:
        data = next(iter(splits.values())).provenance.data
        raise DinoError(
            f"the images of these features have no labels: {data} has no class folders",
            "put each class in a folder of its own (data/cat/1.jpg, data/dog/2.jpg) and extract again",
        )
    if any(f.values.ndim != 2 for f in labelled.values()):
        raise DinoError(
            "these features are patch tokens; expected one feature vector per image", "extract again with --tokens cls"
        )
    train = labelled[learned_from(labelled)]
    test = next((labelled[name] for name in ("val", "test") if name in labelled and labelled[name] is not train), None)
    if test is not None:
        test = _with_classes_of(train, test)
    return train, test


def unlabelled(splits: dict[str, Features]) -> list[str]:
    """Return a line per partly labelled split, with the number of unlabelled images that `compared` ignores."""
    missing = {name: int(np.count_nonzero(f.labels < 0)) for name, f in splits.items() if f.classes}
    return [
        f"ignoring {count} of the {len(splits[name])} images of {name}, which have no label"
        for name, count in missing.items()
        if 0 < count < len(splits[name])
    ]


def _keep_labelled(features: Features) -> Features:
    """Return the features of the labelled images."""
    return subset(features, np.flatnonzero(features.labels >= 0))


def subset(features: Features, rows: Indices) -> Features:
    """Return the features of some images, in memory; unchanged if the rows are as many as there are.

    Args:
        features: Features of S images.
        rows: Indices of the images, ascending and without repetition.
    """
    if len(rows) == len(features):
        return features
    return replace(
        features,
        values=features.values[rows],
        labels=features.labels[rows],
        paths=[features.paths[row] for row in rows.tolist()],
        views=None if features.views is None else features.views[rows],
    )


def _with_classes_of(train: Features, test: Features) -> Features:
    """Return the test features with labels as indices into the training split's classes."""
    index = {name: i for i, name in enumerate(train.classes)}
    unknown = [name for name in test.classes if name not in index]
    if unknown:
        raise DinoError(
            f"the class {unknown[0]} of the test split is not in the training split",
            "give both splits the same class folders",
        )
    translate = np.array([index[name] for name in test.classes])
    return replace(test, labels=translate[test.labels], classes=train.classes)
