"""Result of decoding: pixels, or the reason for failure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
UNKNOWN_FORMAT = "not an image: unknown format"
NO_NUMBER = "damaged: none of its values is a number"


@dataclass(frozen=True)
class BadImage:
    """Reason why a file could not be read, as `category: details`. Reports count by category."""

    reason: str
