from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from dinocli.apps.plot.columns import Column, named
from dinocli.apps.plot.page import colors_of
from dinocli.apps.plot.picture import write_picture

POINTS = np.random.default_rng(0).normal(size=(300, 2)).astype(np.float32)


def test_points_have_the_colors_of_their_names(tmp_path: Path) -> None:
    column = named("class", ["a", "b", "b"] * 100)
    write_picture(tmp_path / "p.png", POINTS, column, "a title")
    pixels = np.asarray(Image.open(tmp_path / "p.png").convert("RGB")).reshape(-1, 3)
    first, second = ((pixels == color).all(1).sum() for color in colors_of(column.kinds))
    assert first > 500 and second > 1.5 * first


def test_numbers_are_drawn_from_low_to_high(tmp_path: Path) -> None:
    values = np.linspace(0, 1, 300).astype(np.float32)
    values[7] = np.nan
    write_picture(tmp_path / "p.png", POINTS, Column("score", [], values), "a title")
    pixels = np.asarray(Image.open(tmp_path / "p.png").convert("RGB")).reshape(-1, 3)
    assert (pixels == (68, 1, 84)).all(1).any() and (pixels == (253, 231, 37)).all(1).any()
