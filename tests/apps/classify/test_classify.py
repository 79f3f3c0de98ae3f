from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from dinocli.apps.classify.classifier import Classifier, LinearRule
from dinocli.apps.classify.classify import (
    Classified,
    Guess,
    by_class,
    check_sort_folder,
    check_table_file,
    classify,
    link_by_class,
    write_table,
)
from dinocli.core.errors import DinoError
from dinocli.evals.accuracy import Interval
from dinocli.features.photos import Encoded
from dinocli.features.store import Provenance

FOUND = [
    Classified("a/1.jpg", [Guess("dog", 0.5), Guess("cat", 0.3)]),
    Classified("b/1.jpg", [Guess("dog", 0.4), Guess("owl", 0.3)]),
    Classified("c.jpg", [Guess("cat", 0.9), Guess("dog", 0.1)]),
]


def test_classes_are_listed_with_the_most_probable_first() -> None:
    rule = LinearRule(np.eye(3, dtype=np.float32), np.zeros(3, np.float32))
    made = Classifier(
        rule, ["cat", "dog", "owl"], Provenance("x", "0", "cls", 1, 8, "d"), 2.0, 9, 1.0, Interval(0, 2), 5, 5
    )
    values = np.array([[0, 2, 1], [3, 0, 0]], np.float32)
    first, second = classify(made, Encoded(["x.jpg", "y.jpg"], values, {}), top=2)
    total = 1 + np.exp(1) + np.exp(0.5)
    assert [g.label for g in first.guesses] == ["dog", "owl"]
    assert [g.confidence for g in first.guesses] == pytest.approx([np.exp(1) / total, np.exp(0.5) / total])
    assert (second.image, second.best.label) == ("y.jpg", "cat")
    assert len(classify(made, Encoded(["x.jpg"], values[:1], {}), top=10)[0].guesses) == 3


def test_the_least_certain_comes_first_in_its_class() -> None:
    assert {label: [one.image for one in some] for label, some in by_class(FOUND).items()} == {
        "cat": ["c.jpg"],
        "dog": ["b/1.jpg", "a/1.jpg"],
    }
    assert list(by_class(FOUND)) == ["cat", "dog"]


def test_the_table_has_a_row_per_image_and_replaces_only_its_own_kind(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    for _ in range(2):
        check_table_file(path)
        write_table(path, FOUND)
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["image", "class", "confidence", "class_2", "confidence_2"]
    assert rows[2] == ["b/1.jpg", "dog", "0.400000", "owl", "0.300000"]
    path.write_text("image,label\n")
    with pytest.raises(DinoError, match="would be overwritten"):
        check_table_file(path)
    with pytest.raises(DinoError, match=r"t\.jpg is no \.csv file"):
        check_table_file(tmp_path / "t.jpg")


def test_photos_are_linked_and_stay_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for one in FOUND:
        Path(one.image).parent.mkdir(exist_ok=True)
        Path(one.image).write_text(one.image)
    check_sort_folder(Path("sorted"))
    assert link_by_class(Path("sorted"), FOUND) == {"dog": 2, "cat": 1}
    links = sorted(path for path in Path("sorted").rglob("*") if path.is_symlink())
    assert [str(path) for path in links] == ["sorted/cat/c.jpg", "sorted/dog/1-2.jpg", "sorted/dog/1.jpg"]
    assert [path.read_text() for path in links] == ["c.jpg", "b/1.jpg", "a/1.jpg"]
    assert all(Path(one.image).is_file() and not Path(one.image).is_symlink() for one in FOUND)
    with pytest.raises(DinoError, match="is not empty") as error:
        check_sort_folder(Path("sorted"))
    assert "sorted-2" in error.value.hint


def test_class_names_of_any_characters_stay_inside_the_folder(tmp_path: Path) -> None:
    labels = ["../../up", "/etc", "..", "", "n/a", "n:a", "a\nb", "ü" * 300]
    found = [Classified(f"{i}.jpg", [Guess(label, 1.0)]) for i, label in enumerate(labels)]
    link_by_class(tmp_path / "in" / "sorted", found)
    folders = [path for path in (tmp_path / "in" / "sorted").iterdir() if path.is_dir()]
    assert len(folders) == len(labels), "every class has its own folder"
    assert len(list((tmp_path / "in" / "sorted").rglob("*.jpg"))) == len(labels)
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["sorted"]


def test_a_file_system_without_links_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted", str(self))

    monkeypatch.setattr(Path, "symlink_to", refuse)
    with pytest.raises(DinoError, match="cannot hold links: Operation not permitted"):
        link_by_class(tmp_path / "sorted", FOUND)
    assert list(tmp_path.iterdir()) == []
