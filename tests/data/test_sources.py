from __future__ import annotations

from pathlib import Path

import pytest
from conftest import write_images

from dinocli.data.sources import image_folder, splits
from dinocli.errors import DinoError


def test_class_folders_are_labels_and_depth_does_not_matter(tmp_path: Path) -> None:
    write_images(tmp_path / "dog" / "2024" / "may", 2)
    write_images(tmp_path / "cat", 1)
    folder = image_folder(tmp_path)
    assert folder.classes == ["cat", "dog"]
    assert folder.paths == ["cat/0000.png", "dog/2024/may/0000.png", "dog/2024/may/0001.png"]
    assert folder.labels == [0, 1, 1]


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    write_images(tmp_path, 2)
    write_images(tmp_path / "more", 1)
    assert (image_folder(tmp_path).classes, image_folder(tmp_path).labels) == ([], [-1] * 3)


def test_other_files_and_hidden_ones_are_passed_over(tmp_path: Path) -> None:
    write_images(tmp_path, 1)
    for name in ("notes.txt", ".DS_Store", "._0000.png"):
        (tmp_path / name).write_bytes(b"x")
    write_images(tmp_path / ".thumbnails", 1)
    assert image_folder(tmp_path).paths == ["0000.png"]


def test_a_link_back_up_does_not_make_the_walk_endless(tmp_path: Path) -> None:
    write_images(tmp_path / "a", 1)
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    assert image_folder(tmp_path).paths == ["a/0000.png"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "does not exist"),
        (lambda p: p.write_text("x"), "is a file"),
        (lambda p: p.mkdir(), "holds nothing"),
        (lambda p: (p.mkdir(), (p / "a.txt").write_text("x")), "1 other files"),
    ],
)
def test_what_is_no_folder_of_images_is_said(tmp_path: Path, make, message: str) -> None:
    make(tmp_path / "x")
    with pytest.raises(DinoError, match=message) as error:
        image_folder(tmp_path / "x")
    assert error.value.hint


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_splits_by_their_common_names(tmp_path: Path, name: str) -> None:
    write_images(tmp_path / "train" / "a", 2)
    write_images(tmp_path / name / "a", 1)
    found = splits(tmp_path)
    assert {split: len(folder) for split, folder in found.items()} == {"train": 2, "val": 1}


def test_a_class_called_test_makes_no_split(tmp_path: Path) -> None:
    write_images(tmp_path / "test", 1)
    write_images(tmp_path / "exam", 1)
    assert splits(tmp_path)["all"].classes == ["exam", "test"]


def test_a_file_that_has_gone_reads_as_empty(tmp_path: Path) -> None:
    folder = image_folder(write_images(tmp_path / "x", 1))
    (tmp_path / "x" / "0000.png").unlink()
    assert folder.read(0) == b""


def test_one_part_alone_is_that_part_and_its_classes_are_classes(tmp_path: Path) -> None:
    write_images(tmp_path / "train" / "a", 2)
    write_images(tmp_path / "train" / "b", 2)
    assert {split: folder.classes for split, folder in splits(tmp_path).items()} == {"train": ["a", "b"]}


def test_two_links_to_one_folder_are_two_classes(tmp_path: Path) -> None:
    write_images(tmp_path / "elsewhere", 1)
    for name in ("a", "b"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / name).symlink_to(tmp_path / "elsewhere")
    assert image_folder(tmp_path / "data").classes == ["a", "b"]
