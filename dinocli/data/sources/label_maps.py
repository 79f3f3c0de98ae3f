"""Label maps: masks whose values are numbers of objects or classes, read and written with their palette."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinocli.core.atomic import atomic
from dinocli.data.decode.mask_values import read_values
from dinocli.data.decode.pixels import BadImage

Labels = NDArray[np.uint8]
IGNORED = 255  # value of ignored pixels in a map of many objects or classes
# Photos and masks with soft edges have more values than this, and are not label maps.
_MOST = 64


@dataclass(frozen=True)
class LabelMap:
    """Label map: the object that each pixel belongs to.

    Attributes:
        values: Number of the object; 0 is background. With a palette, 255 is void; without one, an object. [H, W]
        palette: Red, green and blue of each value. None if the file had no colors.
    """

    values: Labels
    palette: bytes | None = None

    @property
    def objects(self) -> list[int]:
        """Values of objects, ascending."""
        return [int(value) for value in np.unique(self.cleared.values) if value]

    @property
    def void(self) -> NDArray[np.bool_]:
        """Unlabelled pixels, as in DAVIS 2017. [H, W]"""
        return (self.values == IGNORED) & (self.palette is not None)

    @property
    def cleared(self) -> LabelMap:
        """Label map with 0 for void pixels."""
        return LabelMap(np.where(self.void, np.uint8(0), self.values), self.palette)


def read_labels(path: Path, most: int = _MOST) -> LabelMap | BadImage:
    """Read a label map: palette indices (not their colors), or grey or black-and-white values.

    Numbers are kept as stored, also from 16 bits, 32 bits and floats. Numbers above 255 are refused.

    Args:
        path: Mask file. Grey values may be stored as colors with equal channels.
        most: Maximum number of objects.

    Returns:
        The label map, or the reason why the file is not one.
    """
    read = read_values(path)
    if isinstance(read, BadImage):
        return read
    if read.lossy:
        return BadImage(f"no label map: {read.lossy} changes values; save the mask as PNG")
    values = read.values
    # Negated, because comparisons with NaN are false.
    wrong = ~((values >= 0) & (values <= 255)) if values.dtype != np.uint8 else np.zeros(1, np.bool_)
    if values.dtype.kind == "f":
        wrong |= values != np.floor(values)
    if wrong.any():
        return BadImage(
            f"no label map: it holds the value {values[wrong][0].item()}; expected object numbers from 0 to 255"
        )
    found = LabelMap(values.astype(np.uint8, copy=False), read.palette)
    if len(found.objects) > most:
        return BadImage(f"no label map: it has {len(found.objects)} values, like a photo or a mask with soft edges")
    return found


def write_labels(path: Path, labels: LabelMap) -> None:
    """Write a label map as a PNG with its palette, or as grey if it has none."""
    image = Image.fromarray(labels.values)
    if labels.palette is not None:
        image.putpalette(labels.palette)
    with atomic(path) as draft:
        image.save(draft, format="PNG")
