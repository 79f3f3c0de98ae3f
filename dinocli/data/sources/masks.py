"""Mask files with the object or the class of each pixel, found by the name of their photo."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dinocli.data.decode.mask_values import read_values
from dinocli.data.decode.pixels import BadImage
from dinocli.data.sources.label_maps import read_labels
from dinocli.data.sources.open import image_folder

_ENDING = "_mask"  # of the names in MVTec AD and others
_CLASSES = 256  # largest number of values in a mask; soft edges and many classes have many


class MaskFolder:
    """Masks in a folder and its subfolders.

    Args:
        folder: Folder of masks. Each has the name of its photo, with any suffix, or with `_mask` at its end;
            subfolders may differ if names are unique.

    Raises:
        DinoError: If the folder does not exist or is empty.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        names = image_folder(folder).names
        self._names = {str(Path(name).with_suffix("")).removesuffix(_ENDING): name for name in names}
        self._stems: dict[str, list[str]] = {}
        for name in names:
            self._stems.setdefault(Path(name).stem.removesuffix(_ENDING), []).append(name)

    def of(self, name: Path) -> Path | None:
        """Return the mask of a photo by its relative path without suffix, or else by its name if that is unique."""
        exact = self._names.get(str(name))
        candidates = self._stems.get(name.name, []) if exact is None else [exact]
        return self.folder / candidates[0] if len(candidates) == 1 else None


def read_object(path: Path) -> NDArray[np.bool_] | BadImage:
    """Read an object mask: values above half of white (255, or 65,535 for 16 bits), or nonzero ones of an index mask.

    Returns:
        True for pixels of the object [H, W], or the reason why the file is no mask.
    """
    read = read_values(path)
    if isinstance(read, BadImage):
        return read
    values, largest = read.values, read.values.max(initial=0)
    if not np.isfinite(largest) or largest > 65535 or values.min(initial=0) < 0:
        invalid = values[~((values >= 0) & (values <= 65535))][0]
        return BadImage(f"no mask: it holds the value {invalid.item()}; expected 0 to 65535")
    if read.palette is None and largest > 32767:
        return values > 32767
    if largest > 255:
        return BadImage(
            f"no mask: its largest value is {largest.item()}; expected 255 or 65535 for white, or numbers up to 127"
        )
    if read.palette is None and largest > 127:
        return values > 127
    if read.lossy and largest:
        return BadImage(f"no mask: {read.lossy} changes values and none is above 127; save the mask as PNG")
    # Some data sets mark the object with 1, or each object with its own number.
    return values > 0


def read_objects(path: Path) -> list[NDArray[np.bool_]] | BadImage:
    """Read the objects of a mask: each number of a label map is one; any other mask has one, as in `read_object`.

    Returns:
        True for pixels of each object [H, W], or the reason why the file has none.
    """
    labels = read_labels(path)
    if isinstance(labels, BadImage) or (labels.palette is None and labels.values.max(initial=0) > 127):
        one = read_object(path)
        if isinstance(one, BadImage):
            return one
        found = [one] if one.any() else []
    else:
        found = [labels.values == number for number in labels.objects]
    return found or BadImage("it has no object")


def read_index(path: Path) -> NDArray[np.uint8] | BadImage:
    """Read the class of each pixel [H, W], 255 if ignored, or return the reason why the mask cannot be read."""
    read = read_labels(path, _CLASSES)
    return read if isinstance(read, BadImage) else read.values


def with_masks(photos: Mapping[Path, Path], masks: MaskFolder) -> tuple[dict[Path, Path], dict[Path, str]]:
    """Match photos with their masks by name.

    Args:
        photos: Path of each photo with its name, as `named_photos` returns them.
        masks: Masks to search.

    Returns:
        Mask of each photo that has one, and the reason for each photo without one.
    """
    found = {path: masks.of(name) for path, name in photos.items()}
    pairs = {path: mask for path, mask in found.items() if mask}
    return pairs, {path: f"no mask with its name in {masks.folder}" for path, mask in found.items() if not mask}
