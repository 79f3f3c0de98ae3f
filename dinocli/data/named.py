"""Photos that a person names, one by one or by the folder, and what to call that which is made of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from dinocli.data.decode import BadImage, Pixels, decode
from dinocli.data.images import ImagesConfig
from dinocli.data.regular import read_file
from dinocli.data.sources import image_folder
from dinocli.errors import DinoError


def named_photos(paths: Sequence[Path]) -> dict[Path, Path]:
    """Each image file, and the name without a suffix of what is made of it, below the folder of such things.

    Args:
        paths: Files, and folders of any depth, whose tree the names keep.

    Raises:
        DinoError: One does not exist, or is a folder without images.
    """
    files: dict[Path, Path] = {}
    for path in paths:
        if path.is_dir():
            files |= {path / inside: Path(inside) for inside in image_folder(path).names}
        elif path.exists():  # of a FIFO or a device its reader says what it is
            files[path] = Path(path.name)
        else:
            raise DinoError(f"a photo or a folder was wanted; {path} does not exist", "check the path")
    return _told_apart(files)


def _told_apart(files: dict[Path, Path]) -> dict[Path, Path]:
    """Names without their suffix, unless two would then be the same."""
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
    """See that nothing that is to be written takes the place of what it is made of.

    Args:
        made: Files to be written.
        given: Files of the user's.

    Raises:
        DinoError: One of the first is one of the second.
    """
    there = [path for path in made if path.exists()]
    theirs = {path.resolve() for path in given} if there else set()
    for path in there:
        if path.resolve() in theirs:
            raise DinoError(f"{path} was given, and would be written over", "name another place with --out")


def read_photo(path: Path, images: ImagesConfig) -> Pixels | BadImage:
    """The pixels of a file, or the reason why there are none. [H, W, C]"""
    try:
        data = read_file(path, images)
    except OSError as error:
        return BadImage(error.strerror or str(error))
    return decode(data, images)
