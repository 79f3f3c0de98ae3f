from __future__ import annotations

import numpy as np

from dinocli.data.decode.bit_depth import Layout
from dinocli.data.decode.raster import ArrayFile, other_channels


def test_a_file_is_upright_and_of_one_page_unless_it_says_otherwise() -> None:
    file = ArrayFile("NPY", 2, 3, 1, np.dtype(np.uint8), Layout(), lambda: np.zeros((2, 3, 1)))
    assert (file.turn, file.pages) == (1, 1)
    assert other_channels("5", 3) == "other channels: 5; expected 3 (images.channels)"
