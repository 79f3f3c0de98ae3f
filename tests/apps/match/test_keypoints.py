from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dinocli.apps.match.keypoints import landmarks, read_keypoints
from dinocli.core.errors import DinoError

A, B = Path("photos/a.jpg"), Path("b.jpg")
SIZES = ((40, 80), (60, 60))


def test_tables_of_matched_points_are_read(tmp_path: Path) -> None:
    (tmp_path / "k.csv").write_text("name, x_b,y_b,X_A,y_a\nnose,1,2,3.5,4\near,5,6,7,8\n")
    rows = [{"x_a": 3.5, "y_a": 4, "x_b": 1, "y_b": 2}, {"x_a": 7, "y_a": 8, "x_b": 5, "y_b": 6}]
    (tmp_path / "k.json").write_text(json.dumps(rows))
    for name in ("k.csv", "k.json"):
        at_a, at_b = read_keypoints(tmp_path / name, A, B, SIZES)
        assert at_a.tolist() == [[3.5, 4], [7, 8]] and at_b.tolist() == [[1, 2], [5, 6]]


def test_landmarks_are_found_by_the_photos_names(tmp_path: Path) -> None:
    (tmp_path / "k.csv").write_text("image_name,p0_x,p0_y,p1_x,p1_y\nb.jpg,1,2,3,4\na.jpg,5,6,,\n")
    at_a, at_b = read_keypoints(tmp_path / "k.csv", A, B, SIZES)
    assert at_a.tolist() == [[5, 6]] and at_b.tolist() == [[1, 2]], "a point missing in one photo is dropped"
    assert landmarks(tmp_path / "k.csv")["b.jpg"].tolist() == [[1, 2], [3, 4]]
    with pytest.raises(DinoError, match=r"no row for c\.jpg"):
        read_keypoints(tmp_path / "k.csv", A, Path("c.jpg"), SIZES)


@pytest.mark.parametrize("form", ["xml", "txt"])
def test_a_homography_gives_the_grid_points_that_map_into_b(tmp_path: Path, form: str) -> None:
    numbers = "0.5 0 20\n0 0.5 0\n0 0 1"
    text = f'<?xml version="1.0"?><o><H><rows>3</rows><data>{numbers}</data></H></o>' if form == "xml" else numbers
    (tmp_path / f"h.{form}").write_text(text)
    at_a, at_b = read_keypoints(tmp_path / f"h.{form}", A, B, SIZES)
    assert at_a[:2].tolist() == [[1, 1], [3, 1]] and at_b[:2].tolist() == [[20.5, 0.5], [21.5, 0.5]]
    np.testing.assert_allclose(at_b, at_a / 2 + [20, 0])
    assert len(at_a) == 40 * 20 and at_b.max() < 60
    (tmp_path / f"h.{form}").write_text(text.replace("20\n", "50\n"))
    assert len(read_keypoints(tmp_path / f"h.{form}", A, B, SIZES)[0]) == 10 * 20, "x below 20 alone stays below 60"


@pytest.mark.parametrize(
    ("name", "text"),
    [("k.csv", "x_a,y_a,x_b,y_b\n1,2,three,4\n"), ("k.csv", ""), ("k.csv", "photo,x,y\na.jpg,1\n"), ("k.json", "{"),
     ("k.json", "[[1, 2, 3, 4]]"), ("h.xml", "<data>1 2 3</data>"), ("h.txt", "\0")],
)  # fmt: skip
def test_an_unreadable_file_hints_at_the_valid_formats(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DinoError, match="has no readable keypoints") as error:
        read_keypoints(tmp_path / name, A, B, SIZES)
    assert "x_a" in error.value.hint


def test_a_missing_file_and_a_file_without_points_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DinoError, match="does not exist"):
        read_keypoints(tmp_path / "k.csv", A, B, SIZES)
    (tmp_path / "k.txt").write_text("1 0 500 0 1 0 0 0 1")
    with pytest.raises(DinoError, match="no point in both photos"):
        read_keypoints(tmp_path / "k.txt", A, B, SIZES)
    (tmp_path / "k.csv").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(DinoError, match="no readable keypoints"):
        read_keypoints(tmp_path / "k.csv", A, B, SIZES)
