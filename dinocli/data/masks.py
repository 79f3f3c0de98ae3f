"""Masks: files that say of each pixel of a photo what it is, found by the photo's name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinocli.data.decode import BadImage
from dinocli.data.sources import image_folder

_INDEX = ("P", "L", "1")  # modes of one channel of 8 bits or fewer


class Masks:
    """The masks in a folder of any depth.

    Args:
        folder: They are called as their photos are, but for the suffix, and lie in the same tree or in any other.

    Raises:
        DinoError: There is no such folder, or nothing in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._names = {str(Path(name).with_suffix("")): name for name in image_folder(folder).names}
        self._stems: dict[str, list[str]] = {}
        for name in self._names.values():
            self._stems.setdefault(Path(name).stem, []).append(name)

    def of(self, name: Path) -> Path | None:
        """The mask of a photo by its name, without suffix, below its folder; else the one of its bare name."""
        whole = self._names.get(str(name))
        alone = self._stems.get(name.name, []) if whole is None else [whole]
        return self.folder / alone[0] if len(alone) == 1 else None


def read_object(path: Path) -> NDArray[np.bool_] | BadImage:
    """Where a mask has its object: above half of 255, or all but 0 in an index mask. [H, W], or the reason why not."""
    values = _read(path)
    if isinstance(values, BadImage):
        return values
    # Of some sets an object is 1, or each has a number of its own.
    return values > (127 if values.max(initial=0) > 127 and not _has_palette(path) else 0)


def read_index(path: Path) -> NDArray[np.uint8] | BadImage:
    """The number of each pixel's class, 255 where it counts for nothing. [H, W], or why it cannot be read."""
    return _read(path)


def _read(path: Path) -> NDArray[np.uint8] | BadImage:
    try:
        with Image.open(path) as image:
            if image.mode not in _INDEX:
                return BadImage(f"no mask: one channel of 8 bits was wanted; it is {image.mode}")
            return np.array(image).astype(np.uint8)
    # Pillow's readers raise nearly every kind of exception on a broken file.
    except Exception as error:
        return BadImage(f"damaged: {str(error)[:160] or type(error).__name__}")


def _has_palette(path: Path) -> bool:
    with Image.open(path) as image:
        return image.mode == "P"


def with_masks(photos: Mapping[Path, Path], masks: Masks) -> tuple[dict[Path, Path], dict[Path, str]]:
    """Photos with their masks, and why others have none.

    Args:
        photos: Each with its name, as `named_photos` has it.
        masks: Of them.
    """
    found = {path: masks.of(name) for path, name in photos.items()}
    pairs = {path: mask for path, mask in found.items() if mask}
    return pairs, {path: f"no mask of its name in {masks.folder}" for path, mask in found.items() if not mask}
