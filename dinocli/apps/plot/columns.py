"""Columns to color points by: classes, clusters, and columns of a table."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dinocli.core.errors import DinoError

_KINDS = 60  # most names of a column; a column with more distinct values is drawn only if they are numbers
_FEW = 12  # numbers with at most this many distinct values are names
NONE = "(none)"


@dataclass(frozen=True)
class Column:
    """Value of each image.

    Attributes:
        kinds: Distinct names; empty for numbers.
        values: Index into `kinds`, or a number, NaN if unknown. [S]
    """

    name: str
    kinds: list[str]
    values: NDArray[np.float32]


def named(name: str, values: Sequence[str | None]) -> Column:
    """Return a column of names; numbers are sorted as such, and None becomes `(none)`, the last."""
    kinds = sorted({value for value in values if value is not None}, key=_order)
    kinds += [NONE] if None in values else []
    index = {kind: i for i, kind in enumerate(kinds)}
    return Column(name, kinds, np.array([index[NONE if value is None else value] for value in values], np.float32))


def read_columns(path: Path, images: Sequence[str], *, with_split: bool = False) -> list[Column]:
    """Read the columns of a CSV file whose first column names images.

    Args:
        path: CSV file with a header, such as of `dino linear --predictions` or `dino anomaly`.
        images: Names of the images. The file may have longer paths with the same end.
        with_split: True if names begin with their split. Files may omit it, as `dino linear --predictions` does, for
            paths that are in one split only.

    Returns:
        Columns of numbers, and of up to 60 different names; others are omitted.

    Raises:
        DinoError: If the file cannot be read, or names none of the images.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            head, *rows = [row for row in csv.reader(file) if row]
    except (OSError, ValueError, csv.Error) as error:
        why = getattr(error, "strerror", None) or error
        raise DinoError(f"--table {path} cannot be read: {why}", "name a CSV file with a header and rows") from error
    place = {name: i for i, name in enumerate(images)}
    if with_split:
        inside = [name.partition("/")[2] for name in images]
        times = Counter(inside)
        place = {name: i for i, name in enumerate(inside) if times[name] == 1} | place
    cells: dict[int, list[str]] = {}
    for row in rows:
        parts = Path(row[0]).parts
        ends = ("/".join(parts[first:]) for first in range(len(parts)))
        found = next((place[end] for end in ends if end in place), None)
        if found is not None:
            cells[found] = row
    if not cells:
        raise DinoError(
            f"--table {path} names none of the images; its first row names {rows[0][0] if rows else 'nothing'}, and "
            f"the features {images[0]}",
            "use the images' paths below their folder in the first column",
        )
    columns = []
    for number, name in enumerate(head[1:], 1):
        texts = [cells[i][number] if i in cells and number < len(cells[i]) else "" for i in range(len(images))]
        if column := _column(name, texts):
            columns.append(column)
    return columns


def _column(name: str, texts: list[str]) -> Column | None:
    distinct = {text for text in texts if text}
    if len(distinct) > _FEW:
        try:
            return Column(name, [], np.array([float(text) if text else np.nan for text in texts], np.float32))
        except ValueError:
            pass
    return named(name, [text or None for text in texts]) if 0 < len(distinct) <= _KINDS else None


def _order(text: str) -> tuple[float, str]:
    try:
        return float(text), text
    except ValueError:
        return float("inf"), text


def choose(columns: Sequence[Column], name: str | None) -> list[Column]:
    """Return the columns with a chosen one first.

    Raises:
        DinoError: If there is no column of this name.
    """
    found = next((column for column in columns if name in (None, column.name)), None)
    if found is None:
        names = [column.name for column in columns]
        raise DinoError(f"--color {name} is no column; there are {', '.join(names)}", f"use --color {names[0]}")
    return [found, *(column for column in columns if column is not found)]
