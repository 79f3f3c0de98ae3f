"""Masks: files with the object or class of each pixel of a photo, found by the photo's name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dinocli.data.decode.mask_values import read_values
from dinocli.data.decode.pixels import BadImage
from dinocli.data.sources.label_maps import read_labels
from dinocli.data.sources.open import image_folder

_CLASSES = 256  # maximum per mask, which may have soft edges or a number for each of many classes


class MaskFolder:
    """Masks in a folder and its subfolders.

    Args:
        folder: Folder of masks that are named as their photos, but for the suffix, in the same tree or in any other.

    Raises:
        DinoError: If the folder does not exist or is empty.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._names = {str(Path(name).with_suffix("")): name for name in image_folder(folder).names}
        self._stems: dict[str, list[str]] = {}
        for name in self._names.values():
            self._stems.setdefault(Path(name).stem, []).append(name)

    def of(self, name: Path) -> Path | None:
        """Return the mask of a photo, by its name without suffix below its folder, or else by its unique bare name."""
        whole = self._names.get(str(name))
        alone = self._stems.get(name.name, []) if whole is None else [whole]
        return self.folder / alone[0] if len(alone) == 1 else None


def read_object(path: Path) -> NDArray[np.bool_] | BadImage:
    """Read the object of a mask: values above half of 255 (of 65,535 for 16 bits), or all but 0 in an index mask.

    Returns:
        True for pixels of the object [H, W], or the reason why the file is no mask.
    """
    read = read_values(path)
    if isinstance(read, BadImage):
        return read
    values, most = read.values, read.values.max(initial=0)
    if not np.isfinite(most) or most > 65535 or values.min(initial=0) < 0:
        odd = values[~((values >= 0) & (values <= 65535))][0]
        return BadImage(f"no mask: it holds the value {odd.item()}; expected 0 to 65535")
    if read.palette is None and most > 32767:
        return values > 32767
    if most > 255:
        return BadImage(
            f"no mask: its largest value is {most.item()}; expected 255 or 65535 for white, or numbers up to 127"
        )
    if read.palette is None and most > 127:
        return values > 127
    if read.lossy and most:
        return BadImage(f"no mask: {read.lossy} changes values and none is above 127; save the mask as PNG")
    # Some data sets mark the object with 1, or each object with its own number.
    return values > 0


def read_index(path: Path) -> NDArray[np.uint8] | BadImage:
    """Read the class of each pixel, 255 if ignored. Return [H, W], or the reason for failure."""
    read = read_labels(path, _CLASSES)
    return read if isinstance(read, BadImage) else read.values


def with_masks(photos: Mapping[Path, Path], masks: MaskFolder) -> tuple[dict[Path, Path], dict[Path, str]]:
    """Match photos with their masks by name.

    Args:
        photos: Path of each photo with its name, as `named_photos` returns them.
        masks: MaskFolder to search.

    Returns:
        The mask of each photo that has one, and the reason for each other photo.
    """
    found = {path: masks.of(name) for path, name in photos.items()}
    pairs = {path: mask for path, mask in found.items() if mask}
    return pairs, {path: f"no mask with its name in {masks.folder}" for path, mask in found.items() if not mask}
