from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinocli.viz.intervals import Interval, intervals_svg, write_intervals

ROWS = [Interval("B, k-NN", 1.2, 0.3, 2.1, certain=True), Interval("B, linear", -0.4, -1.1, 0.3, certain=False)]


def test_intervals_are_text_and_lines_in_the_pages_colors() -> None:
    svg = intervals_svg(ROWS, "points", "in words")
    for text in ("B, k-NN", "B, linear", "+1.2 (+0.3 to +2.1)", "-0.4 (-1.1 to +0.3)", "points"):
        assert f">{text}</text>" in svg
    assert 'aria-label="in words"' in svg and "var(--curve-0)" in svg and "#1f6fb4" not in svg
    assert svg == intervals_svg(ROWS, "points", "in words"), "reproducible"
    assert "var(--curve-0)" not in intervals_svg(ROWS[1:], "points", ""), "chance is gray"


def test_labels_of_any_length_and_characters_are_drawn() -> None:
    name = "timm:" + "x" * 60 + ", $a$ \x1b k-NN"
    svg = intervals_svg([Interval(name, 0.0, 0.0, 0.0, certain=False)], "points", "")
    assert "…" in svg and "x" * 50 not in svg and "\x1b" not in svg and "$a$" in svg


@pytest.mark.parametrize("count", [1, 12])
def test_the_picture_grows_with_its_rows(tmp_path: Path, count: int) -> None:
    write_intervals(ROWS[:1] * count, "points", tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as picture:
        pixels = np.asarray(picture.convert("L"))
    assert math.isclose(pixels.shape[0], 120 * (0.75 + 0.34 * count), abs_tol=2)
    assert (pixels[:, :4] == 255).all() and (pixels[:, -4:] == 255).all(), "nothing is cut off"
