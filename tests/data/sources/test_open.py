from __future__ import annotations

from pathlib import Path

import pytest
from conftest import write_images
from PIL import Image

from dinocli.core.errors import DinoError
from dinocli.data.sources.open import image_folder, open_images, open_source, splits


def test_top_level_folders_are_classes_at_any_depth(tmp_path: Path) -> None:
    write_images(tmp_path / "dog" / "2024" / "may", 2)
    write_images(tmp_path / "cat", 1)
    folder = image_folder(tmp_path)
    assert folder.classes == ["cat", "dog"]
    assert list(folder.names) == ["cat/0000.png", "dog/2024/may/0000.png", "dog/2024/may/0001.png"]
    assert folder.labels.tolist() == [0, 1, 1]


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    write_images(tmp_path, 2)
    write_images(tmp_path / "more", 1)
    folder = image_folder(tmp_path)
    assert (folder.classes, folder.labels.tolist()) == ([], [-1] * 3)


def test_other_files_and_hidden_ones_are_skipped(tmp_path: Path) -> None:
    write_images(tmp_path, 1)
    for name in ("notes.txt", ".DS_Store", "._0000.png"):
        (tmp_path / name).write_bytes(b"x")
    write_images(tmp_path / ".thumbnails", 1)
    assert list(image_folder(tmp_path).names) == ["0000.png"]


def test_a_link_to_a_parent_folder_is_not_followed(tmp_path: Path) -> None:
    write_images(tmp_path / "a", 1)
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    assert list(image_folder(tmp_path).names) == ["a/0000.png"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "does not exist"),
        (lambda p: p.write_text("x"), "is a file"),
        (lambda p: p.mkdir(), "holds nothing"),
        (lambda p: (p.mkdir(), (p / "a.txt").write_text("x")), r"holds 1 \.txt"),
    ],
)
def test_a_folder_without_images_is_an_error(tmp_path: Path, make, message: str) -> None:
    make(tmp_path / "x")
    with pytest.raises(DinoError, match=message) as error:
        image_folder(tmp_path / "x")
    assert error.value.hint


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_splits_by_their_common_names(tmp_path: Path, name: str) -> None:
    write_images(tmp_path / "train" / "a", 2)
    write_images(tmp_path / name / "a", 1)
    found = splits(str(tmp_path))
    assert {split: len(folder) for split, folder in found.items()} == {"train": 2, "val": 1}


def test_a_class_named_test_is_not_a_split(tmp_path: Path) -> None:
    write_images(tmp_path / "test", 1)
    write_images(tmp_path / "exam", 1)
    assert splits(str(tmp_path))["all"].classes == ["exam", "test"]


def test_an_image_without_a_suffix_is_recognized_by_its_first_bytes(tmp_path: Path) -> None:
    write_images(tmp_path, 1)
    (tmp_path / "0000.png").rename(tmp_path / "00ff")
    (tmp_path / "README").write_text("no image")
    assert list(image_folder(tmp_path).names) == ["00ff"]


FIRST = ("dog", "10", "Lynx lynx")  # label of the first image in the lists below


@pytest.mark.parametrize(
    ("name", "text", "classes"),
    [
        ("list.txt", "x/0000.png\nx/0001.png\n", []),
        ("list.txt", "# two\n\nx/0001.png\tcat\nx/0000.png\tdog\n", ["cat", "dog"]),
        ("list.txt", "x/0000.png 10\nx/0001.png 9\n", ["9", "10"]),
        ("list.csv", "x/0000.png,dog\nx/0001.png,cat\n", ["cat", "dog"]),
        ("list.csv", "id,Label,FileName\n7,dog,x/0000.png\n8,cat,x/0001.png\n", ["cat", "dog"]),
        ("list.tsv", "path\tspecies\nx/0000.png\tLynx lynx\nx/0001.png\tFelis\n", ["Felis", "Lynx lynx"]),
    ],
)
def test_a_list_of_files(tmp_path: Path, name: str, text: str, classes: list[str]) -> None:
    write_images(tmp_path / "x", 2)
    (tmp_path / name).write_text(text)
    source = open_source(str(tmp_path / name))
    assert sorted(source.names) == ["x/0000.png", "x/0001.png"]
    assert source.classes == classes
    assert source.read(0) == (tmp_path / source.names[0]).read_bytes()
    if classes:
        named = dict(zip(source.names, (source.classes[label] for label in source.labels), strict=True))
        assert named["x/0000.png"] == next(word for word in FIRST if word in classes)


def test_a_name_with_spaces_in_a_list(tmp_path: Path) -> None:
    write_images(tmp_path, 1)
    (tmp_path / "0000.png").rename(tmp_path / "my cat 1.png")
    (tmp_path / "list.txt").write_text("my cat 1.png\n")
    assert list(open_images(str(tmp_path / "list.txt")).names) == ["my cat 1.png"]


def test_a_list_of_missing_files_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("nothing.png\n")
    with pytest.raises(DinoError, match=r"first file of .*nothing\.png"):
        open_source(str(tmp_path / "list.txt"))
    (tmp_path / "list.txt").write_text("\n")
    with pytest.raises(DinoError, match="is empty"):
        open_source(str(tmp_path / "list.txt"))


@pytest.fixture
def eurosat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write files where torchvision would download them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for label in ("Forest", "River"):
        write_images(tmp_path / "dinocli" / "torchvision" / "EuroSAT" / "eurosat" / "2750" / label, 3)


def test_a_torchvision_set_without_splits(eurosat: None) -> None:
    source = open_source("torchvision:eurosat")
    assert (len(source), source.classes, source.labels.tolist()) == (6, ["Forest", "River"], [0, 0, 0, 1, 1, 1])
    assert source.read(0).size == (32, 32)
    assert set(splits("torchvision:EuroSAT")) == {"all"}


class Digits:
    """A torchvision set like CIFAR10: two splits by a flag, decoded images."""

    def __init__(self, root: str, train: bool = True, download: bool = False) -> None:
        assert download
        self.targets = [0, 1, 1] if train else [1, 0]
        self.classes = ["no", "yes"]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.new("L", (9, 8), index), self.targets[index]


class Flowers:
    """A torchvision set like Flowers102: splits by name, labels in a private attribute."""

    def __init__(self, root: str, split: str = "train", download: bool = False) -> None:
        if split not in ("train", "val", "test"):
            raise ValueError(f"Unknown value '{split}' for argument split.")
        self._labels = [0, 2, 1]

    def __len__(self) -> int:
        return 3


def test_torchvision_sets_with_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvision.datasets.CIFAR10", Digits)
    monkeypatch.setattr("torchvision.datasets.Flowers102", Flowers)
    assert {part: len(found) for part, found in splits("torchvision:CIFAR10").items()} == {"train": 3, "test": 2}
    assert len(open_source("torchvision:cifar10")) == 3
    assert open_source("torchvision:CIFAR10/test").labels.tolist() == [1, 0]
    assert set(splits("torchvision:Flowers102")) == {"train", "val", "test"}
    assert open_source("torchvision:Flowers102").classes == ["0", "1", "2"]
    with pytest.raises(DinoError, match="has no split 'night'"):
        open_source("torchvision:Flowers102/night")
    with pytest.raises(DinoError, match="no data set 'Flower'") as error:
        open_source("torchvision:Flower")
    assert "torchvision:Flowers102" in error.value.hint


def test_a_failed_download_names_the_folder_for_its_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no network here")

    monkeypatch.setattr(Digits, "__init__", offline)
    monkeypatch.setattr("torchvision.datasets.CIFAR10", Digits)
    with pytest.raises(DinoError, match="could not load CIFAR10: no network here") as error:
        open_source("torchvision:CIFAR10")
    assert "dinocli/torchvision/CIFAR10" in error.value.hint


def test_a_single_split_is_recognized(tmp_path: Path) -> None:
    write_images(tmp_path / "train" / "a", 2)
    write_images(tmp_path / "train" / "b", 2)
    assert {split: folder.classes for split, folder in splits(str(tmp_path)).items()} == {"train": ["a", "b"]}


def test_two_links_to_one_folder_are_two_classes(tmp_path: Path) -> None:
    write_images(tmp_path / "elsewhere", 1)
    for name in ("a", "b"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / name).symlink_to(tmp_path / "elsewhere")
    assert image_folder(tmp_path / "data").classes == ["a", "b"]


def test_arrays_are_images_only_in_a_folder_without_other_images(tmp_path: Path) -> None:
    for name in ("a/1.npy", "b/2.NPY", "b/words.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    source = image_folder(tmp_path)
    assert (list(source.names), source.classes) == (["a/1.npy", "b/2.NPY"], ["a", "b"])
    (tmp_path / "a" / "1.jpg").write_bytes(b"x")
    assert list(image_folder(tmp_path).names) == ["a/1.jpg"], (
        "next to images, arrays are mostly their features or masks"
    )
