"""Features written for other tools, with progress, by `dino extract` and `dino export`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dinocli.cli import console

if TYPE_CHECKING:
    from dinocli.features.store import Features
    from dinocli.features.tabular import TableFormat


def write_tables(parts: Mapping[str, Features], folder: Path, to: TableFormat) -> dict[str, list[Path]]:
    """Write the features of each split for other tools, and return the files of each.

    Raises:
        DinoError: If the features do not fit the format, or its package is missing.
        OSError: If the disk is full or the folder is not writable.
    """
    from dinocli.features.tabular import write_tabular

    files = {}
    for split, features in parts.items():
        with console.progress(f"write {split} as {to}", len(features), "images") as advance:
            files[split] = write_tabular(features, split, folder, to, advance)
    return files
