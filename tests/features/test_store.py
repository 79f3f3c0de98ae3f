from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import dinocli
from dinocli.core.errors import DinoError
from dinocli.core.tensors import write_tensors
from dinocli.features.store import (
    Provenance,
    checksum_of,
    compared,
    learned_from,
    read_features,
    read_splits,
    subset,
    unlabelled,
)
from dinocli.features.writer import write_features

PROVENANCE = Provenance("ckpt.safetensors", "0123456789abcdef", "cls", 1, 224, "data")


def write(
    path: Path, rows: int = 3, width: tuple[int, ...] = (4,), classes: tuple[str, ...] = ("a", "b"), **changed: object
) -> None:
    with write_features(path, Provenance(**(vars(PROVENANCE) | changed)), classes) as writer:
        for i in range(rows):
            label = i % len(classes) if classes else -1
            writer.append(np.full((1, *width), i, dtype=np.float32), [label], [f"a/ünïcode {i}.png"])
        writer.skipped["bad.png"] = "no image"


def rewrite(path: Path, tensors: dict[str, np.ndarray | None] | None = None, **metadata: str) -> None:
    """Rewrite a feature file with some parts changed, and without a checksum, as in earlier versions."""
    with safe_open(path, framework="numpy") as file:
        stored = {name: file.get_tensor(name) for name in ("values", "labels", "paths", "skipped")}
        told = {key: value for key, value in file.metadata().items() if key != "crc32"}
    stored |= tensors or {}
    write_tensors(path, {name: value for name, value in stored.items() if value is not None}, told | metadata)


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("width", [(4,), (3,), (5, 3)])
def test_written_features_are_read_back(tmp_path: Path, rows: int, width: tuple[int, ...]) -> None:
    write(tmp_path / "f.safetensors", rows, width)
    read = read_features(tmp_path / "f.safetensors")
    assert read.values.shape == (rows, *width)
    assert read.values[:].reshape(rows, -1)[:, 0].tolist() == list(range(rows))
    assert read.labels.tolist() == [i % 2 for i in range(rows)]
    assert list(read.paths) == [f"a/ünïcode {i}.png" for i in range(rows)]
    assert (read.classes, read.skipped, read.provenance) == (["a", "b"], {"bad.png": "no image"}, PROVENANCE)


def test_other_readers_of_safetensors_can_read_it(tmp_path: Path) -> None:
    write(tmp_path / "f.safetensors", 3, (3,))
    with safe_open(tmp_path / "f.safetensors", framework="pt") as file:
        assert {"values", "labels", "paths", "skipped"} <= set(file.keys())
        assert file.get_tensor("values").shape == (3, 3)


@pytest.mark.parametrize("content", [b"", b"rubbish", b"\x08\0\0\0\0\0\0\0{}      "])
def test_a_file_that_holds_no_features_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "f.safetensors").write_bytes(content)
    with pytest.raises(DinoError):
        read_features(tmp_path / "f.safetensors")


@pytest.mark.parametrize(
    ("changed", "what"),
    [({"fingerprint": "f" * 16}, "weights"), ({"tokens": "cls+avg"}, "tokens"), ({"data": "other"}, "data sets")],
)
def test_splits_of_different_extractions_are_refused(tmp_path: Path, changed: dict, what: str) -> None:
    write(tmp_path / "train.safetensors")
    write(tmp_path / "val.safetensors", **changed)
    with pytest.raises(DinoError, match=f"different {what}"):
        read_splits(tmp_path)


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir()])
def test_a_folder_without_features_is_an_error(tmp_path: Path, make) -> None:
    make(tmp_path / "features")
    with pytest.raises(DinoError, match="expected a folder of features"):
        read_splits(tmp_path / "features")


def test_test_labels_index_the_training_classes(tmp_path: Path) -> None:
    write(tmp_path / "train.safetensors", 6, classes=("a", "b", "c"))
    write(tmp_path / "val.safetensors", 4, classes=("a", "c"))
    train, test = compared(read_splits(tmp_path))
    assert test.labels.tolist() == [0, 2, 0, 2]
    assert test.classes == train.classes


def test_features_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
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


def test_views_are_stored_with_each_image_and_missing_in_older_files(tmp_path: Path) -> None:
    values = np.arange(3 * 3 * 4, dtype=np.float32).reshape(3, 3, 4)
    with write_features(tmp_path / "train.safetensors", replace(PROVENANCE, views=2), ["a"]) as writer:
        writer.append(values, [0, 0, 0], ["x", "y", "z"])
    write(tmp_path / "val.safetensors", classes=("a",))
    train, val = compared(read_splits(tmp_path))
    np.testing.assert_array_equal(train.values[:], values[:, 0])
    np.testing.assert_array_equal(train.views[:], values[:, 1:])
    np.testing.assert_array_equal(train.views[np.array([2, 0]), np.array([1, 0])], values[[2, 0], [2, 1]])
    assert (val.views, val.provenance.views) == (None, 0)
    rewrite(
        tmp_path / "val.safetensors", recipe=json.dumps({k: v for k, v in vars(PROVENANCE).items() if k != "views"})
    )
    assert read_features(tmp_path / "val.safetensors").provenance == PROVENANCE


@pytest.mark.parametrize("step", [0, 400, None])
def test_the_step_of_the_weights_is_kept(tmp_path: Path, step: int | None) -> None:
    write(tmp_path / "f.safetensors", run="runs/tiny-1", step=step)
    assert read_features(tmp_path / "f.safetensors").provenance == replace(PROVENANCE, run="runs/tiny-1", step=step)


def test_a_classifier_learns_from_the_training_split_or_the_first() -> None:
    assert learned_from(["test", "train", "val"]) == "train"
    assert learned_from({"all": 1}) == "all"


def test_the_error_for_a_folder_of_splits_names_one_file(tmp_path: Path) -> None:
    write(tmp_path / "f" / "train.safetensors")
    with pytest.raises(DinoError, match=r"f is a folder of splits") as error:
        read_features(tmp_path / "f")
    assert error.value.hint == f"use {tmp_path / 'f' / 'train.safetensors'}"


def test_any_changed_byte_is_detected(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    write(path, 3)
    content = path.read_bytes()
    room = int.from_bytes(content[:8], "little")
    header = len(content[8 : 8 + room].rstrip())
    for place in [*range(0, 8 + header, 7), *range(8 + room, len(content))]:
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        try:
            read = read_features(path)
        except DinoError:
            continue
        # Corruption of only the checksum's key makes the file look like one of an earlier version.
        assert b"crc32" not in path.read_bytes()
        assert read.values[:].tolist() == [[i] * 4 for i in range(3)]
    path.write_bytes(content)
    assert len(read_features(path)) == 3


BAD = {
    "no values": ({"values": None}, {}, "its values are missing"),
    "no paths": ({"paths": None}, {}, "its paths are missing"),
    "labels of floats": ({"labels": np.zeros(3)}, {}, "damaged"),
    "fewer labels": ({"labels": np.zeros(2, np.int64)}, {}, "3 rows of features and 2 labels"),
    "labels in a table": ({"labels": np.zeros((3, 1), np.int64)}, {}, "3 rows of features and 3 labels"),
    "fewer paths": ({"paths": np.frombuffer(b"a\0b", np.uint8)}, {}, "3 labels and 2 paths"),
    "a label too large": ({"labels": np.array([0, 2, 1])}, {}, "the label 2 is out of range: it has 2 classes"),
    "a label too small": ({"labels": np.array([0, -2, 1])}, {}, "the label -2 is out of range"),
    "one number": ({"values": np.zeros((), np.float32)}, {}, "0 rows"),
    "torn skipped": ({"skipped": np.frombuffer(b"{", np.uint8)}, {}, "skipped images cannot be read"),
    "a list of skipped": ({"skipped": np.frombuffer(b"[]", np.uint8)}, {}, "skipped images cannot be read"),
    "torn recipe": ({}, {"recipe": "{"}, "its metadata cannot be read"),
    "nested recipe": ({}, {"recipe": '{"a":' * 100_000}, "nested too deeply"),
    "nested classes": ({}, {"classes": "[" * 100_000}, "nested too deeply"),
    "a later recipe": ({}, {"recipe": json.dumps(vars(PROVENANCE) | {"novel": 1})}, "by a later version .* novel"),
    "a recipe of words": (
        {},
        {"recipe": json.dumps(vars(PROVENANCE) | {"blocks": "4"})},
        "the provenance has blocks='4'",
    ),
    "a short recipe": ({}, {"recipe": '{"source": "x"}'}, "its metadata cannot be read"),
    "classes of numbers": ({}, {"classes": "[1, 2]"}, "its metadata cannot be read"),
    "views that are not there": (
        {},
        {"recipe": json.dumps(vars(PROVENANCE) | {"views": 3})},
        "its rows have shape 4, which does not fit 3 views",
    ),
}


@pytest.mark.parametrize(("tensors", "metadata", "said"), BAD.values(), ids=BAD)
def test_inconsistent_parts_are_one_line(
    tmp_path: Path, tensors: dict[str, np.ndarray | None], metadata: dict[str, str], said: str
) -> None:
    path = tmp_path / "f.safetensors"
    write(path)
    rewrite(path, tensors, **metadata)
    with pytest.raises(DinoError, match=said) as error:
        read_features(path)
    assert "\n" not in error.value.message


@pytest.mark.parametrize(
    "name", ["../f.safetensors", "/f.safetensors", "a/../../f.safetensors", "..", "x\\\\f.safetensors"]
)
def test_an_index_may_name_only_files_of_its_folder(tmp_path: Path, name: str) -> None:
    write(tmp_path / "f.safetensors")
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "index.json").write_text(json.dumps({"dinocli": "features", "images": {name: 3}}))
    with pytest.raises(DinoError, match="is not a file name in this folder"):
        read_features(tmp_path / "f")


def test_images_without_a_label_are_ignored(tmp_path: Path) -> None:
    write(tmp_path / "f.safetensors")
    rewrite(tmp_path / "f.safetensors", {"labels": np.array([0, -1, 1])})
    splits = read_splits(tmp_path)
    train, _ = compared(splits)
    assert (len(train), train.labels.tolist()) == (2, [0, 1])
    assert unlabelled(splits) == ["ignoring 1 of the 3 images of f, which have no label"]


def spoil(path: Path, row: int, value: float) -> None:
    """Change one value of a feature file and drop its checksum, as in a file of version 0.1."""
    with safe_open(path, framework="numpy") as file:
        tensors, metadata = {key: np.array(file.get_tensor(key)) for key in file.keys()}, file.metadata()  # noqa: SIM118
    tensors["values"][row].reshape(-1)[1] = value
    metadata.pop("crc32", None)
    save_file(tensors, path, metadata)


@pytest.mark.parametrize(("width", "views"), [((4,), 0), ((5, 3), 0), ((5, 3), 4)])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_features_that_are_not_finite_are_refused_and_named(
    tmp_path: Path, width: tuple[int, ...], dtype: str, views: int
) -> None:
    path = tmp_path / "train.safetensors"
    provenance, width = replace(PROVENANCE, views=views), (1 + views, *width[-1:]) if views else width
    with write_features(path, provenance, ["a", "b"], dtype=dtype) as writer:
        writer.append(np.ones((3, *width), np.float32), [0, 1, 0], ["a/0.png", "b/1.png", "a/2.png"])
    read_features(path)
    for value in (np.nan, -np.inf):
        spoil(path, 1, value)
        for read in (read_features, lambda p: read_splits(p.parent), lambda p: dinocli.read_features(str(p))):
            with pytest.raises(DinoError, match=r"train.safetensors: row 1 \(b/1.png\) holds 1 of \d+ values") as error:
                read(path)
            assert "dino extract" in error.value.hint


def test_a_non_finite_row_of_a_shard_is_named(tmp_path: Path) -> None:
    with write_features(tmp_path / "f.safetensors", PROVENANCE, [], shard_bytes=40) as writer:
        for i in range(5):
            writer.append(np.ones((2, 4), np.float32), [-1, -1], [f"{i}-0.png", f"{i}-1.png"])
    spoil(tmp_path / "f" / "00002.safetensors", 1, np.inf)
    with pytest.raises(DinoError, match=r"f: row 5 \(2-1.png\) holds 1 of 4"):
        read_features(tmp_path / "f")


def write_labels(path: Path, labels: list[int], classes: tuple[str, ...]) -> None:
    with write_features(path, PROVENANCE, classes) as writer:
        writer.append(np.eye(len(labels), 8, dtype=np.float32), labels, [f"{i}.png" for i in range(len(labels))])


def test_numeric_labels_without_class_names_become_the_class_names(tmp_path: Path) -> None:
    write_labels(tmp_path / "train.safetensors", [0, 2, -1, 1], ())
    write_labels(tmp_path / "val.safetensors", [1, 1], ())
    train, val = compared(read_splits(tmp_path))
    assert (train.classes, val.labels.tolist()) == (["0", "1", "2"], [1, 1])
    assert (train.labels.tolist(), list(train.paths)) == ([0, 2, 1], ["0.png", "1.png", "3.png"])
    assert train.values[:].argmax(1).tolist() == [0, 1, 3]
    write_labels(tmp_path / "x" / "train.safetensors", [-1, -1], ("a",))
    with pytest.raises(DinoError, match="have no labels: data has no class folders"):
        compared(read_splits(tmp_path / "x"))


def test_the_checksum_changes_with_any_number_and_not_with_the_place(tmp_path: Path) -> None:
    for name in ("one", "again"):
        write(tmp_path / name / "train.safetensors")
    write(tmp_path / "other" / "train.safetensors", rows=4)
    one, again, other = (checksum_of(tmp_path / name / "train.safetensors") for name in ("one", "again", "other"))
    assert one == again != other
    rewrite(tmp_path / "one" / "train.safetensors")  # without a stored checksum
    assert checksum_of(tmp_path / "one" / "train.safetensors") == checksum_of(tmp_path / "one" / "train.safetensors")
    with pytest.raises(DinoError, match="does not exist"):
        checksum_of(tmp_path / "none.safetensors")


def test_the_checksum_of_shards_covers_each_of_them(tmp_path: Path) -> None:
    def write_shards(name: str, last: float) -> Path:
        with write_features(tmp_path / name, PROVENANCE, ["a"], shard_bytes=64) as writer:
            for value in (0.0, 1.0, last):
                writer.append(np.full((4, 4), value, np.float32), [0] * 4, ["x"] * 4)
        return writer.place

    first, same, other = write_shards("a.safetensors", 2), write_shards("b.safetensors", 2), write_shards("c.st", 3)
    assert first.is_dir()
    assert checksum_of(first) == checksum_of(same) != checksum_of(other)


def test_a_subset_keeps_the_rows_their_labels_and_names(tmp_path: Path) -> None:
    write(tmp_path / "train.safetensors", rows=5)
    some = subset(read_features(tmp_path / "train.safetensors"), np.array([4, 1]))
    assert some.values[:, 0].tolist() == [4, 1]
    assert some.labels.tolist() == [0, 1]
    assert some.paths == ["a/ünïcode 4.png", "a/ünïcode 1.png"]
    assert some.place == tmp_path / "train.safetensors"
