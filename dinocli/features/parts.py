"""Parts of an extraction, such as of a job array, joined to the features of a single extraction."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinocli.core.checksums import parse
from dinocli.core.errors import DinoError
from dinocli.core.tensors import map_tensors, read_metadata
from dinocli.features.extract import Extracted
from dinocli.features.store import COUNTS, INDEX, PART, Features, read_features, read_provenance
from dinocli.features.unfinished import Job, differences
from dinocli.features.writer import Part, write_features

_FOLDER = ".parts"
_NAME = re.compile(r"\d+-of-\d+")


def part_path(path: Path, part: Part) -> Path:
    """Return the file for a part of the features at `path`, in a folder that commands do not take for a split."""
    return path.with_suffix(_FOLDER) / f"{part.number}-of-{part.of}.safetensors"


def find_parts(places: Sequence[Path]) -> dict[str, list[Path]]:
    """Return the parts in some folders by split, and those named themselves.

    Args:
        places: Folders of features, folders of parts, or parts.

    Raises:
        DinoError: If a place does not exist or holds no parts.
    """
    found: dict[str, list[Path]] = {}
    for place in places:
        inside = [place] if _is_part(place) else [*filter(_is_part, _list(place)), *_in_folders(place)]
        if not inside:
            fault = "holds no parts" if place.exists() else "does not exist"
            raise DinoError(
                f"{place} {fault}; expected parts of an extraction", "dino extract CHECKPOINT DATA --part 1/2, then 2/2"
            )
        for path in inside:
            found.setdefault(path.parent.name.removesuffix(_FOLDER), []).append(path)
    return found


def _in_folders(place: Path) -> Iterator[Path]:
    for folder in _list(place):
        if folder.suffix == _FOLDER:
            yield from filter(_is_part, _list(folder))


def _list(place: Path) -> list[Path]:
    return sorted(place.iterdir()) if place.is_dir() else []


def _is_part(path: Path) -> bool:
    whole = path.is_dir() and (path / INDEX).is_file()
    return bool(_NAME.fullmatch(path.stem)) and (whole or path.suffix == ".safetensors")


@dataclass(frozen=True)
class _Stored:
    """A part on disk.

    Attributes:
        path: Its file, or folder of shards.
        part: Its place among the parts.
        job: Everything that decided the bytes of the features.
        counts: Number of rows and of skipped files of each batch. [B, 2]
        features: Its features.
    """

    path: Path
    part: Part
    job: Job
    counts: NDArray[np.int64]
    features: Features

    def batches(self) -> Iterator[tuple[slice, list[tuple[str, str]]]]:
        """Yield the rows and the skipped files of each batch."""
        rows, bad = np.cumsum(self.counts, axis=0).T.tolist() if len(self.counts) else ([], [])
        skipped = list(self.features.skipped.items())
        for row, last, first_bad, last_bad in zip([0, *rows], rows, [0, *bad], bad, strict=False):
            yield slice(row, last), skipped[first_bad:last_bad]

    def values(self, rows: slice) -> NDArray[np.float32]:
        """Return rows as they were extracted, with the views beside them."""
        values = self.features.values[rows]
        if self.features.views is None:
            return values
        return np.concatenate([values[:, None], self.features.views[rows]], axis=1)


def join(paths: Sequence[Path], path: Path, report: Callable[[int], None] = lambda images: None) -> Extracted:
    """Join all parts of an extraction; the output has the same bytes as that of an extraction in one piece.

    Args:
        paths: Parts, in any order.
        path: Output file; see `write_features`.
        report: Callback that receives the number of joined images after each batch.

    Raises:
        DinoError: If a part is missing, is given twice, is corrupt or is of another extraction, or no part has a row.
    """
    parts = _check([_read(place) for place in paths])
    first, skipped = parts[0], dict[str, str]()
    _, classes = read_provenance(first.path, _metadata(first.path))
    if not any(len(each.features) for each in parts):
        raise DinoError(
            f"the {len(parts)} parts in {first.path.parent} hold no features", "check the images: all were skipped"
        )
    with write_features(path, first.features.provenance, classes, dtype=first.job["dtype"]) as writer:
        for some in zip_longest(*(each.batches() for each in parts)):
            for each, batch in zip(parts, some, strict=True):
                if batch is None:
                    continue
                rows, bad = batch
                if rows.start < rows.stop:
                    names = each.features.paths[rows]
                    writer.append(each.values(rows), each.features.labels[rows].tolist(), names)
                for name, reason in bad:
                    skipped.setdefault(name, reason)
            report(writer.rows + len(skipped))
        writer.skipped |= skipped
    return Extracted(writer.place, writer.rows, writer.shape, skipped)


def _read(path: Path) -> _Stored:
    """Read a part.

    Raises:
        DinoError: If it is corrupt, or not a part.
    """
    features, metadata = read_features(path), _metadata(path)
    try:
        known: dict[str, Any] = parse(metadata[PART])
        part, job = Part(int(known["number"]), int(known["of"])), dict(known["job"])
        counts = np.concatenate([map_tensors(file, verify=False)[0][COUNTS] for file in _files(path)])
        if counts.sum(0).tolist() != [len(features), len(features.skipped)]:
            raise ValueError("its batches do not have as many images as it has")
    except (LookupError, ValueError, TypeError) as error:
        raise DinoError(
            f"{path} is not a part of an extraction", "dino extract CHECKPOINT DATA --part 1/2 writes one"
        ) from error
    return _Stored(path, part, job, counts, features)


def _metadata(path: Path) -> dict[str, str]:
    return read_metadata(_files(path)[0])


def _files(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors")) if path.is_dir() else [path]


def _check(parts: Sequence[_Stored]) -> list[_Stored]:
    """Return the parts in order.

    Raises:
        DinoError: If they are not all parts of one extraction, each once.
    """
    first, numbered = parts[0], dict[int, _Stored]()
    for each in parts:
        other = differences(first.job, each.job)
        if other or each.part.of != first.part.of:
            raise DinoError(
                f"{first.path} and {each.path} are parts of different extractions: {other or 'other numbers of parts'}",
                "name the parts of one extraction only, or extract them again with the same options",
            )
        if before := numbered.get(each.part.number):
            raise DinoError(
                f"{before.path} and {each.path} are the same part, {each.part.number}/{each.part.of}",
                f"omit {each.path}",
            )
        numbered[each.part.number] = each
    missing = [f"{number}/{first.part.of}" for number in range(1, first.part.of + 1) if number not in numbered]
    if missing:
        raise DinoError(
            f"{len(missing)} of {first.part.of} parts are missing beside {first.path}: {', '.join(missing[:6])}"
            + (", ..." if missing[6:] else ""),
            f"dino extract CHECKPOINT DATA --part {missing[0]}",
        )
    return [numbered[number] for number in sorted(numbered)]
