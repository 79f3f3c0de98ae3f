"""Classification of photos: their most probable classes, as rows, a CSV file, and folders of links."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dinocli.apps.classify.classifier import Classifier
from dinocli.core import tables
from dinocli.core.atomic import atomic_folder
from dinocli.core.errors import DinoError
from dinocli.core.tables import first_line
from dinocli.features.photos import Encoded

_COLUMNS = ("image", "class", "confidence")
_LONGEST = 200  # bytes of a folder or file name; most file systems allow 255


class Guess(NamedTuple):
    """Class of a photo, and its probability from 0 to 1."""

    label: str
    confidence: float


@dataclass(frozen=True)
class Classified:
    """Photo with its most probable classes, the most probable first."""

    image: str
    guesses: list[Guess]

    @property
    def best(self) -> Guess:
        """Most probable class."""
        return self.guesses[0]


def classify(classifier: Classifier, photos: Encoded, top: int = 1) -> list[Classified]:
    """Return the most probable classes of photos.

    Args:
        classifier: Classifier for features of the photos' encoder.
        photos: Features of the photos.
        top: Number of classes per photo, or all if there are fewer.
    """
    chances = classifier.probabilities(photos.values)
    order = np.argsort(-chances, axis=1, kind="stable")[:, :top]
    return [
        Classified(name, [Guess(classifier.classes[i], float(row[i])) for i in best])
        for name, row, best in zip(photos.names, chances, order.tolist(), strict=True)
    ]


def by_class(found: Sequence[Classified]) -> dict[str, list[Classified]]:
    """Group photos by their most probable class, with the least certain first. Classes are sorted by name."""
    groups: dict[str, list[Classified]] = {}
    for one in sorted(found, key=lambda one: (one.best.label, one.best.confidence)):
        groups.setdefault(one.best.label, []).append(one)
    return groups


def check_table_file(path: Path) -> None:
    """Check that a path is a CSV file, and would replace no other file.

    Raises:
        DinoError: If the suffix is not .csv, or the path is a file without the columns of `write_table`.
    """
    if path.suffix.lower() != ".csv":
        raise DinoError(f"--csv {path} is no .csv file", f"use --csv {path.with_suffix('.csv')}")
    if path.is_file() and not first_line(path).startswith(",".join(_COLUMNS).encode()):
        raise DinoError(
            f"{path} exists and holds no classified images; it would be overwritten",
            f"name a new file, such as {path.with_name(f'{path.stem}-classes.csv')}",
        )


def write_table(path: Path, found: Sequence[Classified]) -> None:
    """Write a CSV file with one row per photo: its name, then each class and its confidence from 0 to 1."""
    most = max(len(one.guesses) for one in found)
    more = [f"{column}_{number}" for number in range(2, most + 1) for column in _COLUMNS[1:]]
    cells = ([cell for guess in one.guesses for cell in (guess.label, f"{guess.confidence:.6f}")] for one in found)
    rows = ([one.image, *own] for one, own in zip(found, cells, strict=True))
    tables.write_table(path, [*_COLUMNS, *more], rows)


def check_sort_folder(folder: Path) -> None:
    """Check that a folder for links is new or empty.

    Raises:
        DinoError: If it holds anything.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise DinoError(
            f"--sort-into {folder} is not empty; expected a new folder",
            f"use --sort-into {folder}-2, or remove the links in {folder}",
        )


def link_by_class(folder: Path, found: Sequence[Classified]) -> dict[str, int]:
    """Link each photo into a folder of its class; the photos stay where they are.

    The folder appears with all links or not at all.

    Args:
        folder: New or empty folder.
        found: Classified photos.

    Returns:
        Number of links by class.

    Raises:
        DinoError: If the file system has no symbolic links.
    """
    names = _name_folders({one.best.label for one in found})
    taken = set[str]()
    with atomic_folder(folder) as draft:
        for one in found:
            source = Path(os.path.abspath(one.image))
            inside, number = Path(names[one.best.label], source.name), 1
            while str(inside).lower() in taken:  # photos of one name, from different folders
                number += 1
                inside = inside.with_name(f"{source.stem}-{number}{source.suffix}")
            taken.add(str(inside).lower())
            link = draft / inside
            link.parent.mkdir(parents=True, exist_ok=True)
            try:
                link.symlink_to(source)
            except (OSError, NotImplementedError) as error:
                raise DinoError(
                    f"--sort-into {folder} cannot hold links: {getattr(error, 'strerror', None) or error}",
                    "use a folder on another disk, or --csv FILE",
                ) from error
    return dict(Counter(one.best.label for one in found))


def _name_folders(labels: set[str]) -> dict[str, str]:
    """Return a valid, distinct folder name for each class. A class name from a file may hold any characters."""
    names: dict[str, str] = {}
    for label in sorted(labels):
        plain = "".join(
            "_" if character in '/\\\0:*?"<>|' or not character.isprintable() else character for character in label
        )
        plain = plain.strip(". ").encode("utf-8", "replace")[:_LONGEST].decode("utf-8", "ignore") or "_"
        name, number = plain, 1
        while name.lower() in {other.lower() for other in names.values()}:
            number += 1
            name = f"{plain}-{number}"
        names[label] = name
    return names
