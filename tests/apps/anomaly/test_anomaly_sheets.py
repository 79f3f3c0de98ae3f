from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinocli.apps.anomaly.bank import Bank, BankSettings
from dinocli.apps.anomaly.detect import Scored
from dinocli.apps.anomaly.sheets import check_table_file, draw_map, draw_sheet, overlay, scale_of, write_table
from dinocli.core.errors import DinoError
from dinocli.data.images import DEFAULTS
from dinocli.features.store import Provenance

HOT = np.array([[0.1, 0.1], [0.1, 0.9]], np.float32)


def a_photo(folder: Path, name: str = "1.png") -> Scored:
    Image.new("RGB", (64, 48), (90, 120, 150)).save(folder / name)
    return Scored(str(folder / name), 0.9, 100, HOT)


def test_the_scale_reaches_from_the_usual_to_the_largest_distance() -> None:
    provenance = Provenance("c", "0", "patches", 1, 48, "d")
    bank = Bank(np.eye(2, dtype=np.float32), np.zeros(2, np.float32), 0.1, BankSettings(48), provenance)
    assert scale_of(bank, [Scored("x", 1, 0, HOT)]) == (0.1, pytest.approx(0.9))
    assert scale_of(bank, [Scored("x", 1, 0, HOT * 0.2)]) == (0.1, pytest.approx(0.3)), "normal photos stay dark"


def test_usual_places_stay_gray_and_anomalies_are_colored() -> None:
    drawn = overlay(np.full((40, 40, 3), (90, 120, 150), np.uint8), Scored("x", 1, 0, HOT), (0.1, 0.9)).astype(int)
    assert np.ptp(drawn[0, 0]) <= 1
    assert np.ptp(drawn[-1, -1]) > 50


def test_a_map_has_the_shape_of_its_photo(tmp_path: Path) -> None:
    one = a_photo(tmp_path)
    draw_map(one, tmp_path / "maps" / "1.png", (0.1, 0.9), DEFAULTS)
    width, height = Image.open(tmp_path / "maps" / "1.png").size
    assert width / height == pytest.approx(64 / 48, rel=0.01)
    Path(one.image).unlink()
    draw_map(one, tmp_path / "gone.png", (0.1, 0.9), DEFAULTS)
    assert not (tmp_path / "gone.png").exists()


def test_a_sheet_shows_each_photo_beside_its_map(tmp_path: Path) -> None:
    photos = [a_photo(tmp_path, f"{i}.png") for i in range(7)]
    Path(photos[6].image).unlink()
    mask = np.zeros((12, 16), bool)
    mask[6:, 8:] = True
    labels = {one.image: "dent" for one in photos}
    draw_sheet(photos, labels, {photos[0].image: mask}, tmp_path / "s.png", (0.1, 0.9), DEFAULTS)
    with_mask = np.asarray(Image.open(tmp_path / "s.png"))
    draw_sheet(photos, labels, {}, tmp_path / "s.png", (0.1, 0.9), DEFAULTS)
    without = np.asarray(Image.open(tmp_path / "s.png"))
    assert with_mask.shape == without.shape and with_mask.shape[1] > 10 * 144
    differs = np.argwhere((with_mask != without).any(2))
    assert len(differs) and (differs[:, 1] < 160).all(), "only the first photo is outlined"


def test_a_table_lists_the_photos_in_order_and_spares_other_files(tmp_path: Path) -> None:
    path = tmp_path / "scores.csv"
    write_table(path, [Scored("a.png", 0.5, 99.5, HOT), Scored("b.png", 0.25, 3, HOT)], {"a.png": "dent"})
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0] == {"image": "a.png", "score": "0.500000", "above_normal": "99.5", "label": "dent"}
    assert [row["image"] for row in rows] == ["a.png", "b.png"]
    check_table_file(path)
    path.write_text("mine\n")
    with pytest.raises(DinoError, match="would be overwritten"):
        check_table_file(path)
