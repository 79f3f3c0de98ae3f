"""Photos given as files or folders, and names of the outputs made from them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from dinocli.core.errors import DinoError
from dinocli.data.decode.image import decode, open_image, reduction
from dinocli.data.decode.pixels import BadImage, Data, Pixels
from dinocli.data.images import DEFAULTS, ImagesConfig
from dinocli.data.sources.lists import LISTS
from dinocli.data.sources.open import photo_files
from dinocli.data.sources.parts import read_image
from dinocli.data.sources.regular import why_unread


def named_photos(paths: Sequence[Path], notes: list[str] | None = None) -> dict[Path, Path]:
    """Map each image file to its output name, without suffix and relative to the output folder.

    Args:
        paths: Image files, folders, and lists of files. The names keep the subfolders.
        notes: List to which messages about files that are not read are added.

    Raises:
        DinoError: If a path does not exist, or is a folder without images.
    """
    files: dict[Path, Path] = {}
    for path in paths:
        if path.is_dir():
            files |= {file: file.relative_to(path) for file in photo_files(path, notes)}
        elif path.suffix.lower() in LISTS and path.is_file():
            listed = photo_files(path, notes)
            root = os.path.commonpath([os.path.abspath(file.parent) for file in listed])
            files |= {file: Path(os.path.relpath(file.absolute(), root)) for file in listed}
        elif path.exists():  # reading reports FIFOs and devices
            files[path] = Path(path.name)
        else:
            raise DinoError(f"{path} does not exist; expected a photo or a folder", "check the path")
    return _remove_suffixes(files)


def _remove_suffixes(files: dict[Path, Path]) -> dict[Path, Path]:
    """Remove the suffix of each name, unless two names would then be equal."""
    stems = [name.with_suffix("") for name in files.values()]
    times, taken = Counter(stems), set[Path]()
    names: dict[Path, Path] = {}
    for (path, name), stem in zip(files.items(), stems, strict=True):
        chosen = stem if times[stem] == 1 else name.with_name(name.name.replace(".", "_"))
        while chosen in taken:
            chosen = chosen.with_name(chosen.name + "_")
        taken.add(chosen)
        names[path] = chosen
    return names


def spare(made: Iterable[Path], given: Iterable[Path]) -> None:
    """Check that no output would overwrite an input.

    Args:
        made: Output files.
        given: Input files.

    Raises:
        DinoError: If an output is an input.
    """
    there = [path for path in made if path.exists()]
    theirs = {path.resolve() for path in given} if there else set()
    for path in there:
        if path.resolve() in theirs:
            raise DinoError(f"{path} is an input, and the output would overwrite it", "choose another path with --out")


def read_photo(path: Path, images: ImagesConfig) -> Pixels | BadImage:
    """Read the pixels of a file. Return [H, W, C], or the reason for failure."""
    try:
        data = read_image(path, images)
    except OSError as error:
        return BadImage(why_unread(error))
    return decode(data, images)


def display_pixels(data: Data, side: int, images: ImagesConfig = DEFAULTS) -> Pixels | BadImage:
    """Decode a photo for display at `side` pixels; large ones are decoded smaller if the decoder can. [H, W, C]"""
    opened = open_image(data, images)
    if isinstance(opened, BadImage):
        return opened
    return opened.pixels(reduction(max(opened.height, opened.width) / (2 * side)))
