"""Result of decoding: pixels, or the reason for failure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dinocli.data.decode.raster import ArrayFile

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels = NDArray[np.uint8]
# Image as a source returns it: bytes of a file, decoded by Pillow, raw values with their layout, or pixels [H, W, C].
Data: TypeAlias = "bytes | Image | ArrayFile | Pixels"
UNKNOWN_FORMAT = "not an image: unknown format"
NO_NUMBER = "damaged: none of its values is a number"


@dataclass(frozen=True)
class BadImage:
    """Reason why a file could not be read, as `category: details`. Reports count by category."""

    reason: str
