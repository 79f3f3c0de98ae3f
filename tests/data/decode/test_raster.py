from __future__ import annotations

import numpy as np

from dinocli.data.decode.bit_depth import Layout
from dinocli.data.decode.raster import ArrayFile, other_channels


def test_by_default_a_file_is_upright_and_has_one_page() -> None:
    file = ArrayFile("NPY", 2, 3, 1, np.dtype(np.uint8), Layout(), lambda: np.zeros((2, 3, 1)))
    assert (file.turn, file.pages) == (1, 1)
    assert other_channels("5", 3) == "other channels: 5; expected 3 (images.channels)"
