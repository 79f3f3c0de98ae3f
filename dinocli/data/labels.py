"""Label maps: masks whose values are numbers of objects or classes, read and written with their palette."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinocli.atomic import atomic
from dinocli.data.decode import BadImage
from dinocli.data.mask_values import read_values

Labels = NDArray[np.uint8]
IGNORED = 255  # of pixels that count for nothing, in a map of many objects or classes
# A photo, or a mask with soft edges, taken for a map of objects has more values than this.
_MOST = 64


@dataclass(frozen=True)
class LabelMap:
    """Which object each pixel belongs to.

    Attributes:
        values: 0 where there is none; 255 is void where there is a palette, and an object where there is none. [H, W]
        palette: Red, green and blue of each value, if the file had colors.
    """

    values: Labels
    palette: bytes | None = None

    @property
    def objects(self) -> list[int]:
        """The values that stand for objects, ascending."""
        return [int(value) for value in np.unique(self.cleared.values) if value]

    @property
    def void(self) -> NDArray[np.bool_]:
        """Pixels of which nobody said what they are, as DAVIS 2017 has them. [H, W]"""
        return (self.values == IGNORED) & (self.palette is not None)

    @property
    def cleared(self) -> LabelMap:
        """The map with 0 where it is void."""
        return LabelMap(np.where(self.void, np.uint8(0), self.values), self.palette)


def read_labels(path: Path, most: int = _MOST) -> LabelMap | BadImage:
    """Read a mask: an image with a palette, whose numbers count and not its colors, or a grey or black-and-white one.

    Numbers are kept as stored, also of 16 bits, 32 bits and floats; larger ones than 255 are refused.

    Args:
        path: The file; grey may have been saved as colors.
        most: Objects that it may hold.

    Returns:
        The map, or the reason why the file is none.
    """
    read = read_values(path)
    if isinstance(read, BadImage):
        return read
    if read.lossy:
        return BadImage(f"no label map: {read.lossy} changes values; save the mask as PNG")
    values = read.values
    # A comparison with NaN is false.
    wrong = ~((values >= 0) & (values <= 255)) if values.dtype != np.uint8 else np.zeros(1, np.bool_)
    if values.dtype.kind == "f":
        wrong |= values != np.floor(values)
    if wrong.any():
        return BadImage(f"no label map: it holds the value {values[wrong][0].item()}; numbers of objects are 0 to 255")
    found = LabelMap(values.astype(np.uint8, copy=False), read.palette)
    if len(found.objects) > most:
        return BadImage(f"no label map: it has {len(found.objects)} values, as photos and masks with soft edges have")
    return found


def write_labels(path: Path, labels: LabelMap) -> None:
    """Write a mask as a PNG, in the palette it came with; grey where it had none."""
    image = Image.fromarray(labels.values)
    if labels.palette is not None:
        image.putpalette(labels.palette)
    with atomic(path) as draft:
        image.save(draft, format="PNG")
