"""Where images come from: a folder, a list of files, tar shards, or one of torchvision's sets."""

from __future__ import annotations

import csv
import difflib
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dinocli.data.images import DEFAULTS, ImagesConfig
from dinocli.data.listing import ARRAY, SUFFIXES, Names, cache_folder, list_files
from dinocli.data.regular import begins_with, read_file
from dinocli.data.shards import Shards, is_shards, open_shards
from dinocli.errors import DinoError, nearest

if TYPE_CHECKING:
    from PIL.Image import Image

# How image files without a suffix begin: JPEG, PNG, GIF, TIFF of both byte orders, BMP, WebP.
_BEGINNINGS = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"II*\0", b"MM\0*", b"BM", b"RIFF")
# Names that a data set's parts commonly carry; the first of each line is what the tool calls it.
_SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
_PATH_COLUMNS = ("path", "file", "filename", "filepath", "file_path", "image", "image_path")
_LABEL_COLUMNS = ("label", "class", "category", "target", "species")
TORCHVISION = "torchvision:"


@dataclass(frozen=True, eq=False)
class Images:
    """Images that can be asked for by number.

    Attributes:
        where: The source as the user named it.
        root: Folder that the names lie below.
        names: Of the files.
        classes: Names of the classes; none for unlabelled images.
        labels: Index of each image's class, -1 where there is none. [S]
    """

    where: str
    root: Path
    names: Names
    classes: list[str]
    labels: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.names)

    @property
    def count(self) -> int:
        """How many there are; of tar shards it may be unknown."""
        return len(self.names)

    @property
    def fingerprint(self) -> str:
        """The same for the same names in the same order, wherever their folder lies."""
        return f"{zlib.crc32(self.names.ends.tobytes(), zlib.crc32(self.names.text.tobytes())):08x}"

    def read(self, index: int, images: ImagesConfig = DEFAULTS) -> bytes | Image:
        """Return the bytes of a file.

        Args:
            index: Number of the image.
            images: Limits; a larger file is not read.

        Raises:
            OSError: The file no longer exists, is too large or no regular file, or permission is denied.
        """
        return read_file(os.path.join(self.root, self.names[index]), images)


@dataclass(frozen=True, eq=False)
class TorchvisionImages(Images):
    """Images of a torchvision data set, which gives them decoded."""

    dataset: Any = None

    def read(self, index: int, images: ImagesConfig = DEFAULTS) -> bytes | Image:
        return self.dataset[index][0]


Source = Images | Shards


def open_source(spec: str) -> Source:
    """Open what a user named.

    Args:
        spec: A folder of images, of any depth; a `.txt` or `.csv` list of files, with labels or without; tar shards
            (`shards/train-{000000..000999}.tar`, a folder of them, or `pipe:COMMAND`); or `torchvision:NAME`, which is
            downloaded on first use, with `/SPLIT` for another part than that for training.

    Raises:
        DinoError: It is not there, or holds no image.
    """
    return open_shards(spec) if is_shards(spec) else open_images(spec)


def open_images(spec: str) -> Images:
    """Open a source whose images can be asked for by number: all but tar shards.

    Raises:
        DinoError: It is not there, or holds no image.
    """
    if spec.startswith(TORCHVISION):
        name, _, split = spec.removeprefix(TORCHVISION).partition("/")
        parts = _torchvision(name, [split] if split else ["train"])
        return next(iter(parts.values()))
    path = Path(spec)
    return (
        _file_list(path) if path.suffix.lower() in (".txt", ".csv", ".tsv") and path.is_file() else image_folder(path)
    )


def splits(spec: str) -> dict[str, Source]:
    """A labelled set by its parts: `train`, `val` and `test` where it has those, else the whole as `all`.

    Raises:
        DinoError: It is not there, or a part of it holds no image.
    """
    if spec.startswith(TORCHVISION) and "/" not in spec:
        return dict(_torchvision(spec.removeprefix(TORCHVISION), list(_SPLITS)))
    root = Path(spec)
    found = {split: root / name for split, spellings in _SPLITS.items() for name in spellings if (root / name).is_dir()}
    # A folder named "test" among others may well be a class: the parts must be all that is there.
    beside = {p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")} if root.is_dir() else set()
    if not found or ("train" not in found and beside - set(found.values())):
        return {"all": open_source(spec)}
    return {split: open_source(str(path)) for split, path in found.items()}


def image_folder(root: Path) -> Images:
    """List the images in a folder of any depth; hidden files and other kinds of file are passed over.

    Arrays (.npy) are images in a folder that holds no others.

    Class names are those of the folders right below, if every image lies in one.

    Raises:
        DinoError: The folder is missing, is a file, or holds no image.
    """
    if not root.exists():
        raise DinoError(f"a folder of images was wanted; {root} does not exist", _nearest_place(root))
    if not root.is_dir():
        raise DinoError(
            f"a folder of images was wanted; {root} is a file", f"name the folder it lies in: {root.parent}"
        )
    names, others = list_files(root, _is_image)
    if not len(names):  # beside images arrays are mostly features, masks or labels of them
        names, others = list_files(root, _is_array)
    if not len(names):
        seen = f"{others} other files" if others else "nothing"
        raise DinoError(
            f"no images in {root}: it holds {seen}",
            f"name a folder with files such as .jpg, .png, .webp or .tif ({len(SUFFIXES)} kinds are read)",
        )
    tops = [name.split("/", 1)[0] if "/" in name else "" for name in names]
    if not all(tops):
        return Images(str(root), root, names, [], np.full(len(names), -1, dtype=np.int32))
    return Images(str(root), root, names, *_numbered(tops))


def _nearest_place(missing: Path) -> str:
    """Return a hint with the nearest name beside a path that does not exist."""
    above = next((parent for parent in missing.parents if parent.is_dir()), Path())
    first = missing.relative_to(above).parts[0]
    try:
        beside = {
            path.name.lower(): path for path in above.iterdir() if path.is_dir() or path.suffix in (".txt", ".csv")
        }
    except OSError:
        beside = {}
    close = difflib.get_close_matches(first.lower(), beside, n=1, cutoff=0.6)
    return f"did you mean {beside[close[0]]}?" if close else "check the path, or `ls` what is there"


def photos(paths: Sequence[Path]) -> Images:
    """Photos, and all that are in folders, as one source without labels.

    Raises:
        DinoError: One is not there, or a folder holds no image.
    """
    names: list[str] = []
    for path in paths:
        if not path.exists():
            raise DinoError(f"a photo or a folder was wanted; {path} does not exist", "check the path")
        names += [str(path / inside) for inside in image_folder(path).names] if path.is_dir() else [str(path)]
    return Images(", ".join(map(str, paths)), Path(), Names.of(names), [], np.full(len(names), -1, dtype=np.int32))


def _is_image(path: str) -> bool:
    suffix = os.path.splitext(path)[1].lower()
    return suffix in SUFFIXES if suffix else begins_with(path, _BEGINNINGS)


def _is_array(path: str) -> bool:
    return path.lower().endswith(ARRAY)


def _numbered(labels: Sequence[str]) -> tuple[list[str], NDArray[np.int32]]:
    """Class names in order, by number where all are numbers, and each image's place among them."""
    numbers = all(label.isdecimal() for label in labels)
    classes = sorted(set(labels), key=(lambda label: (int(label), label)) if numbers else None)
    place = {name: i for i, name in enumerate(classes)}
    return classes, np.array([place[label] for label in labels], dtype=np.int32)


def _file_list(path: Path) -> Images:
    """A text file with a path a line, or a table with a column of paths and perhaps one of labels.

    Relative paths start at the list's own folder. In a text file a label may follow after a tab or a space.

    Raises:
        DinoError: It is empty, or its first file does not exist.
    """
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = _table_rows(file, path) if path.suffix.lower() != ".txt" else _text_rows(file, path)
    if not rows:
        raise DinoError(
            f"a list of files was wanted; {path} is empty", "one path a line, relative to the list's folder"
        )
    first = path.parent / rows[0][0]
    if not first.is_file():
        raise DinoError(
            f"the first file of {path} does not exist: {first}", "paths in a list are relative to the list's folder"
        )
    names = Names.of([name for name, _ in rows])
    labels = [label for _, label in rows]
    if not all(labels):
        return Images(str(path), path.parent, names, [], np.full(len(names), -1, dtype=np.int32))
    return Images(str(path), path.parent, names, *_numbered(labels))


def _text_rows(file: Any, path: Path) -> list[tuple[str, str]]:
    lines = [line.strip("\r\n") for line in file]
    lines = [line for line in lines if line.strip() and not line.startswith("#")]
    if not lines:
        return []
    # Names may hold spaces: whether the last word of a line is a label is asked of the first file.
    tab = any("\t" in line for line in lines[:1])
    spaced = not tab and not (path.parent / lines[0]).exists() and " " in lines[0]
    pairs = [
        line.partition("\t")[::2] if tab else line.rpartition(" ")[::2] if spaced else (line, "") for line in lines
    ]
    return [(name, label.strip()) for name, label in pairs]


def _table_rows(file: Any, path: Path) -> list[tuple[str, str]]:
    table = [row for row in csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",") if any(row)]
    head = [cell.strip().lower() for cell in table[0]] if table else []
    column = next((head.index(name) for name in _PATH_COLUMNS if name in head), None)
    if column is None:
        return [(row[0], row[1].strip() if len(row) > 1 else "") for row in table]
    label = next((head.index(name) for name in _LABEL_COLUMNS if name in head), None)
    return [(row[column], row[label].strip() if label is not None else "") for row in table[1:]]


def _torchvision(name: str, wanted: Sequence[str]) -> dict[str, Images]:
    """The parts of a torchvision set that there are, of those wanted; `all` where it has no parts.

    Raises:
        DinoError: There is no such set or part, or it could not be downloaded.
    """
    import inspect

    from torchvision import datasets

    known = [kind for kind in datasets.__all__ if isinstance(getattr(datasets, kind), type)]
    exact = next((kind for kind in known if kind.lower() == name.lower()), None)
    if exact is None:
        raise DinoError(f"torchvision has no data set {name!r}", f"did you mean {TORCHVISION}{nearest(name, known)}?")
    kind = getattr(datasets, exact)
    takes = inspect.signature(kind).parameters
    options: dict[str, Any] = {"root": str(cache_folder() / "torchvision" / exact)}
    if "download" in takes:
        options["download"] = True
    parts: dict[str, Images] = {}
    for part in wanted if {"split", "train"} & set(takes) else ["all"]:
        choice = {"split": part} if "split" in takes else {"train": part == "train"} if "train" in takes else {}
        if part == "val" and "train" in takes and "split" not in takes:
            continue
        try:
            dataset = kind(**options, **choice)
        except ValueError as error:
            if "split" in str(error) and len(wanted) > 1:
                continue  # this set has no such part
            raise DinoError(f"torchvision's {exact} has no part {part!r}: {error}", f"{TORCHVISION}{exact}") from error
        except (RuntimeError, OSError, TypeError) as error:
            said = (str(error).splitlines() or [type(error).__name__])[0]
            raise DinoError(
                f"torchvision could not give {exact}: {said}",
                f"put its files into {options['root']}, where it is looked for, or name a folder of images",
            ) from error
        parts[part] = _of_torchvision(dataset, f"{TORCHVISION}{exact}/{part}")
    return parts


def _of_torchvision(dataset: Any, where: str) -> Images:
    found = next(
        (getattr(dataset, key) for key in ("targets", "labels", "_labels", "y") if hasattr(dataset, key)), None
    )
    if found is None and hasattr(dataset, "_samples"):
        found = [label for _, label in dataset._samples]
    labels = np.asarray(found if found is not None else [-1] * len(dataset), dtype=np.int32)
    names = getattr(dataset, "classes", None) or [str(i) for i in range(int(labels.max(initial=-1)) + 1)]
    classes = [name if isinstance(name, str) else ", ".join(name) for name in names] if labels.min() >= 0 else []
    places = Names.of([str(i) for i in range(len(dataset))])
    return TorchvisionImages(where, Path(where), places, classes, labels, dataset)
