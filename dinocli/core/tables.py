"""Tables for spreadsheets: CSV files, written completely or not at all."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from dinocli.core.atomic import atomic


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write a CSV file with a header. Names of files that are not valid Unicode keep their bytes.

    Raises:
        OSError: If the disk is full or the place is not writable.
    """
    with atomic(path) as draft, draft.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


def first_line(path: Path) -> bytes:
    """Return the first line of a file, at most 200 bytes, with its end."""
    with path.open("rb") as file:
        return file.readline(200)
