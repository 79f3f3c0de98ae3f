"""Label maps: masks whose values are numbers of objects or classes, read and written with their palette."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinocli.atomic import atomic
from dinocli.data.decode import BadImage
from dinocli.data.images import DEFAULTS

Labels = NDArray[np.uint8]
IGNORED = 255  # of pixels that count for nothing, in a map of many objects or classes
# A photo, or a mask with soft edges, taken for a map of objects has more values than this.
_MOST = 64
_TOO_LARGE = f"too large: over {DEFAULTS.max_megapixels:g} megapixels"


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

    Args:
        path: The file; grey may have been saved as colors.
        most: Objects that it may hold.

    Returns:
        The map, or why the file is none.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                if image.width * image.height > DEFAULTS.max_megapixels * 1e6:
                    return BadImage(_TOO_LARGE)
                found = _labels(image)
    except Image.DecompressionBombError:
        return BadImage(_TOO_LARGE)
    # Pillow's readers raise nearly every kind of exception on a broken file.
    except Exception as error:
        return BadImage(f"damaged: {' '.join(str(error).split())[:160] or type(error).__name__}")
    if found is None:
        return BadImage(
            f"no label map: its pixels are {image.mode}, and not numbers of objects (a palette, or 8-bit grey)"
        )
    if len(found.objects) > most:
        return BadImage(f"no label map: it has {len(found.objects)} values, as photos and masks with soft edges have")
    return found


def _labels(image: Image.Image) -> LabelMap | None:
    if image.mode == "P":
        palette = image.getpalette()
        return LabelMap(np.array(image), bytes(palette) if palette else None)
    if image.mode in ("L", "1"):
        return LabelMap(np.array(image.convert("L")))
    if image.mode in ("RGB", "RGBA"):
        colors = np.array(image)[..., :3]
        if (colors == colors[..., :1]).all():  # grey that was saved as colors
            return LabelMap(np.ascontiguousarray(colors[..., 0]))
    return None


def write_labels(path: Path, labels: LabelMap) -> None:
    """Write a mask as a PNG, in the palette it came with; grey where it had none."""
    image = Image.fromarray(labels.values)
    if labels.palette is not None:
        image.putpalette(labels.palette)
    with atomic(path) as draft:
        image.save(draft, format="PNG")
