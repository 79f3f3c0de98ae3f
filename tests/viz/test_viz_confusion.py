from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinocli.viz.confusion import write_confusion


@pytest.mark.parametrize("classes", [2, 30, 200])
def test_a_diagonal_is_drawn_dark_and_the_rest_pale(tmp_path: Path, classes: int) -> None:
    names = [f"$class_{i}$" for i in range(classes)]  # not valid as mathematics
    write_confusion(np.eye(classes, dtype=np.int64) * 7, names, "title", tmp_path / "c.png")
    pixels = np.asarray(Image.open(tmp_path / "c.png").convert("RGB")).astype(int)
    dark = (pixels[..., 2] - pixels[..., 0] > 60) & (pixels[..., 2] < 130)  # the blue of a share of 1
    rows, columns = np.nonzero(dark[:, : pixels.shape[1] * 3 // 4])  # without the color bar
    assert len(rows)
    assert np.corrcoef(rows, columns)[0, 1] > 0.7, "from the upper left to the lower right"


def test_an_empty_row_and_odd_names_are_drawn(tmp_path: Path) -> None:
    write_confusion(np.array([[0, 0], [3, 1]]), ["a\nb", "x" * 90], "t", tmp_path / "c.png")
    assert Image.open(tmp_path / "c.png").size[0] < 1200, "a long name is cut"
