"""Where images come from."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from dinocli.errors import DinoError

SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .tif .tiff .bmp .dib .gif .avif .jp2 .j2k .ppm .pgm .pbm .pnm .tga".split()
)
# Names that a data set's parts commonly carry; the first of each line is what the tool calls it.
_SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}


@dataclass(frozen=True)
class ImageFolder:
    """The images below a folder, in the order of their names.

    Attributes:
        root: The folder.
        paths: Below the root.
        classes: Names of the folders right below the root, if every image lies in one; else none.
        labels: For each path the index of its class; -1 where there are no classes.
    """

    root: Path
    paths: list[str]
    classes: list[str]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> bytes:
        """The bytes of a file; empty where it has gone since it was listed."""
        try:
            return (self.root / self.paths[index]).read_bytes()
        except OSError:
            return b""


def image_folder(root: Path) -> ImageFolder:
    """List the images in a folder of any depth; hidden files and other kinds of file are passed over.

    Raises:
        DinoError: The folder is missing, is a file, or holds no image.
    """
    if not root.exists():
        raise DinoError(
            f"a folder of images was wanted; {root} does not exist", "check the path, or `ls` what is there"
        )
    if not root.is_dir():
        raise DinoError(
            f"a folder of images was wanted; {root} is a file", f"name the folder it lies in: {root.parent}"
        )
    paths, others = _walk(root)
    if not paths:
        seen = f"{others} other files" if others else "nothing"
        raise DinoError(
            f"no images in {root}: it holds {seen}",
            f"name a folder with files such as .jpg, .png, .webp or .tif ({len(SUFFIXES)} kinds are read)",
        )
    tops = [path.split("/")[0] if "/" in path else "" for path in paths]
    if not all(tops):
        return ImageFolder(root, paths, [], [-1] * len(paths))
    classes = sorted(set(tops))
    index = {name: i for i, name in enumerate(classes)}
    return ImageFolder(root, paths, classes, [index[top] for top in tops])


def splits(root: Path) -> dict[str, ImageFolder]:
    """A labelled set by its parts: `train`, `val` and `test` where the folder has those, else the whole as `all`.

    Raises:
        DinoError: The folder is missing, is a file, or a part of it holds no image.
    """
    found = {split: root / name for split, spellings in _SPLITS.items() for name in spellings if (root / name).is_dir()}
    # A folder named "test" among others may well be a class: the parts must be all that is there.
    beside = {p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")} if root.is_dir() else set()
    if not found or ("train" not in found and beside - set(found.values())):
        return {"all": image_folder(root)}
    return {split: image_folder(path) for split, path in found.items()}


def _walk(root: Path) -> tuple[list[str], int]:
    paths: list[str] = []
    others = 0
    for folder, below, files in os.walk(root, followlinks=True):
        below[:] = [n for n in sorted(below) if not n.startswith(".") and not _leads_back(Path(folder, n))]
        inside = os.path.relpath(folder, root).replace(os.sep, "/")
        for name in files:
            if name.startswith("."):
                continue
            if os.path.splitext(name)[1].lower() in SUFFIXES:
                paths.append(name if inside == "." else f"{inside}/{name}")
            else:
                others += 1
    return sorted(paths), others


def _leads_back(folder: Path) -> bool:
    """Whether it is a link to a folder that it lies in, which would make a walk endless."""
    if not folder.is_symlink():
        return False
    above = folder.parent.resolve()
    return folder.resolve() in (above, *above.parents)
