from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dinocli.apps.plot.columns import NONE, choose, named, read_columns
from dinocli.core.errors import DinoError


def test_names_are_sorted_and_missing_ones_come_last() -> None:
    column = named("class", ["b", None, "a", "b"])
    assert column.kinds == ["a", "b", NONE]
    assert column.values.tolist() == [1, 2, 0, 1]
    assert named("cluster", ["10", "9", "0"]).kinds == ["0", "9", "10"]


def test_columns_of_a_table_are_matched_by_the_end_of_the_path(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    rows = [f"data/val/a/{i}.jpg,{'x' if i % 2 else 'y'},{i / 10},{i % 3},note {i}" for i in range(80)]
    path.write_text("image,predicted,confidence,folds,text\n" + "\n".join(rows) + "\nelsewhere.jpg,z,1,1,\n")
    images = [*(f"val/a/{i}.jpg" for i in range(80)), "val/b/0.jpg"]
    predicted, confidence, folds = read_columns(path, images)
    assert (predicted.name, predicted.kinds) == ("predicted", ["x", "y", NONE])
    assert predicted.values[:2].tolist() == [1, 0] and predicted.values[-1] == 2
    assert not confidence.kinds and confidence.values[:80] == pytest.approx(np.arange(80) / 10)
    assert np.isnan(confidence.values[-1])
    assert folds.kinds == ["0", "1", "2", NONE], "few numbers are names; a column of 80 texts is omitted"


def test_a_table_may_omit_the_split_of_images_that_are_in_one(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("image,predicted\na/1.jpg,x\na/2.jpg,y\na/3.jpg,z\n")
    [column] = read_columns(path, ["train/a/1.jpg", "train/a/2.jpg", "val/a/2.jpg", "val/a/3.jpg"], with_split=True)
    assert [column.kinds[int(value)] for value in column.values] == ["x", NONE, NONE, "z"], "2.jpg is in both"
    with pytest.raises(DinoError, match="names none of the images"):
        read_columns(path, ["b/a/x/1.jpg"])


def test_a_table_of_other_images_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("image,x\nb.jpg,1\n")
    with pytest.raises(DinoError, match=r"names none of the images; its first row names b\.jpg"):
        read_columns(path, ["a.jpg"])
    for text in ("", "\xff"):
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(DinoError, match="cannot be read"):
            read_columns(path, ["a.jpg"])
    with pytest.raises(DinoError, match="cannot be read: No such file"):
        read_columns(tmp_path / "none.csv", ["a.jpg"])


def test_the_chosen_column_comes_first() -> None:
    columns = [named("class", ["a"]), named("cluster", ["0"])]
    assert [column.name for column in choose(columns, "cluster")] == ["cluster", "class"]
    assert choose(columns, None)[0].name == "class"
    with pytest.raises(DinoError, match="--color x is no column; there are class, cluster"):
        choose(columns, "x")
