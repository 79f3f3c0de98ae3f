from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from dinocli.errors import DinoError
from dinocli.features import Recipe, compared, learned_from, read_features, read_splits
from dinocli.storing import write_features

RECIPE = Recipe("ckpt.safetensors", "0123456789abcdef", "cls", 1, 224, "data")


def write(
    path: Path, rows: int = 3, width: tuple[int, ...] = (4,), classes: tuple[str, ...] = ("a", "b"), **changed: object
) -> None:
    with write_features(path, Recipe(**(vars(RECIPE) | changed)), classes) as writer:
        for i in range(rows):
            label = i % len(classes) if classes else -1
            writer.append(np.full((1, *width), i, dtype=np.float32), [label], [f"a/ünïcode {i}.png"])
        writer.skipped["bad.png"] = "no image"


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("width", [(4,), (3,), (5, 3)])
def test_what_is_written_is_read(tmp_path: Path, rows: int, width: tuple[int, ...]) -> None:
    write(tmp_path / "f.safetensors", rows, width)
    read = read_features(tmp_path / "f.safetensors")
    assert read.values.shape == (rows, *width)
    assert read.values[:].reshape(rows, -1)[:, 0].tolist() == list(range(rows))
    assert read.labels.tolist() == [i % 2 for i in range(rows)]
    assert list(read.paths) == [f"a/ünïcode {i}.png" for i in range(rows)]
    assert (read.classes, read.skipped, read.recipe) == (["a", "b"], {"bad.png": "no image"}, RECIPE)


def test_other_readers_of_safetensors_can_read_it(tmp_path: Path) -> None:
    write(tmp_path / "f.safetensors", 3, (3,))
    with safe_open(tmp_path / "f.safetensors", framework="pt") as file:
        assert {"values", "labels", "paths", "skipped"} <= set(file.keys())
        assert file.get_tensor("values").shape == (3, 3)


@pytest.mark.parametrize("content", [b"", b"rubbish", b"\x08\0\0\0\0\0\0\0{}      "])
def test_a_file_that_is_none_is_said(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "f.safetensors").write_bytes(content)
    with pytest.raises(DinoError):
        read_features(tmp_path / "f.safetensors")


@pytest.mark.parametrize(
    ("changed", "what"),
    [({"fingerprint": "f" * 16}, "weights"), ({"tokens": "cls+avg"}, "tokens"), ({"data": "other"}, "data sets")],
)
def test_splits_that_do_not_belong_together_are_refused(tmp_path: Path, changed: dict, what: str) -> None:
    write(tmp_path / "train.safetensors")
    write(tmp_path / "val.safetensors", **changed)
    with pytest.raises(DinoError, match=f"different {what}"):
        read_splits(tmp_path)


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir()])
def test_a_folder_without_features_is_said(tmp_path: Path, make) -> None:
    make(tmp_path / "features")
    with pytest.raises(DinoError, match="expected a folder of features"):
        read_splits(tmp_path / "features")


def test_test_labels_count_in_the_training_classes(tmp_path: Path) -> None:
    write(tmp_path / "train.safetensors", 6, classes=("a", "b", "c"))
    write(tmp_path / "val.safetensors", 4, classes=("a", "c"))
    train, test = compared(read_splits(tmp_path))
    assert test.labels.tolist() == [0, 2, 0, 2]
    assert test.classes == train.classes


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "x" / "all.safetensors", classes=())
    with pytest.raises(DinoError, match="no class folders"):
        compared(read_splits(tmp_path / "x"))
    write(tmp_path / "y" / "all.safetensors", width=(5, 3))
    with pytest.raises(DinoError, match="patch tokens"):
        compared(read_splits(tmp_path / "y"))
    write(tmp_path / "z" / "train.safetensors")
    write(tmp_path / "z" / "val.safetensors", classes=("zebra",))
    with pytest.raises(DinoError, match="zebra"):
        compared(read_splits(tmp_path / "z"))


def test_views_lie_beside_each_image_and_older_files_have_none(tmp_path: Path) -> None:
    values = np.arange(3 * 3 * 4, dtype=np.float32).reshape(3, 3, 4)
    with write_features(tmp_path / "train.safetensors", replace(RECIPE, views=2), ["a"]) as writer:
        writer.append(values, [0, 0, 0], ["x", "y", "z"])
    write(tmp_path / "val.safetensors", classes=("a",))
    train, val = compared(read_splits(tmp_path))
    np.testing.assert_array_equal(train.values[:], values[:, 0])
    np.testing.assert_array_equal(train.views[:], values[:, 1:])
    np.testing.assert_array_equal(train.views[np.array([2, 0]), np.array([1, 0])], values[[2, 0], [2, 1]])
    assert (val.views, val.recipe.views) == (None, 0)
    content = (tmp_path / "val.safetensors").read_bytes()
    assert b', \\"views\\": 0' in content
    (tmp_path / "val.safetensors").write_bytes(content.replace(b', \\"views\\": 0', b" " * 14))
    assert read_features(tmp_path / "val.safetensors").recipe == RECIPE


def test_a_classifier_learns_from_the_training_split_or_the_first() -> None:
    assert learned_from(["test", "train", "val"]) == "train"
    assert learned_from({"all": 1}) == "all"


def test_a_folder_of_splits_names_one_to_read(tmp_path: Path) -> None:
    write(tmp_path / "f" / "train.safetensors")
    with pytest.raises(DinoError, match=r"f is a folder of splits") as error:
        read_features(tmp_path / "f")
    assert error.value.hint == f"take {tmp_path / 'f' / 'train.safetensors'}"
