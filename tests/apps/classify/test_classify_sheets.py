from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from dinocli.apps.classify.classify import Classified, Guess, by_class
from dinocli.apps.classify.sheets import PHOTOS, draw_classes

COLORS = {"red": (255, 0, 0), "green": (0, 255, 0)}


def test_a_row_shows_the_least_certain_photos_of_its_class(tmp_path: Path) -> None:
    found = []
    for name, color in COLORS.items():
        Image.new("RGB", (40, 40), color).save(tmp_path / f"{name}.png")
        count = PHOTOS + 3 if name == "red" else 2
        found += [Classified(str(tmp_path / f"{name}.png"), [Guess(name, i / 20)]) for i in range(count)]
    found.append(Classified(str(tmp_path / "gone.png"), [Guess("green", 0.9)]))
    [path] = draw_classes(by_class(found), tmp_path / "out" / "classify.png")
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    squares = {n: round((np.abs(pixels - c).max(-1) < 60).sum() / 144**2) for n, c in COLORS.items()}
    assert squares == {"red": PHOTOS, "green": 2}


def test_many_classes_take_several_sheets(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    found = [Classified(str(tmp_path / "x.png"), [Guess(f"class {i:03}", 0.5)]) for i in range(45)]
    written = draw_classes(by_class(found), tmp_path / "c.jpg")
    assert [path.name for path in written] == ["c.jpg", "c-2.jpg", "c-3.jpg"]
