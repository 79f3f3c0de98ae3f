from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinocli.apps.segment.pairs import labelled_set
from dinocli.core.errors import DinoError
from dinocli.data.images import DEFAULTS


def write(folder: Path, names: list[str], values: tuple[int, ...] = (0, 1), inside: str = "") -> None:
    for kind in ("images", "masks"):
        (folder / kind / inside).mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (len(values), 4)).save(folder / "images" / inside / f"{name}.jpg")
        mask = np.tile(np.array(values, dtype=np.uint8), (4, 1))
        Image.fromarray(mask).save(folder / "masks" / inside / f"{name}.png")


def test_splits_may_be_above_or_below_images_and_masks(tmp_path: Path) -> None:
    write(tmp_path / "a" / "train", ["1", "2"], (0, 1, 2, 255))
    write(tmp_path / "a" / "val", ["3"])
    write(tmp_path / "b", ["1", "2"], inside="training")
    write(tmp_path / "b", ["3"], inside="validation")
    (tmp_path / "a" / "classes.txt").write_text("sky\nsea\n")
    for root, classes in ((tmp_path / "a", ["sky", "sea", "2"]), (tmp_path / "b", ["0", "1"])):
        data = labelled_set(root)
        assert [path.stem for path in data.train.masks] == ["1", "2"]
        assert [path.stem for path in data.val.masks] == ["3"]
        assert data.classes == classes
        assert not data.split_off
    pixels, truth = labelled_set(tmp_path / "a").train.read(
        next(iter(labelled_set(tmp_path / "a").train.masks)), DEFAULTS
    )
    assert pixels.shape == (4, 4, 3)
    assert truth[0].tolist() == [0, 1, 2, 255]


def test_without_splits_a_tenth_is_held_out_by_the_seed(tmp_path: Path) -> None:
    write(tmp_path, [f"{i:02}" for i in range(30)])
    data, again, other = labelled_set(tmp_path), labelled_set(tmp_path), labelled_set(tmp_path, seed=1)
    assert data.split_off
    assert len(data.train.masks) == 27
    assert len(data.val.masks) == 3
    assert not set(data.train.masks) & set(data.val.masks)
    assert data == again
    assert set(other.val.masks) != set(data.val.masks)


def test_masks_with_only_0_and_255_are_binary(tmp_path: Path) -> None:
    write(tmp_path, [str(i) for i in range(10)], (0, 255))
    data = labelled_set(tmp_path)
    assert data.classes == ["background", "object"]
    assert data.train.read(next(iter(data.train.masks)), DEFAULTS)[1][0].tolist() == [0, 1]
    write(tmp_path, ["11"], (0, 3, 255))
    data = labelled_set(tmp_path)
    assert len(data.classes) == 4
    assert data.train.read(next(iter(data.train.masks)), DEFAULTS)[1][0].tolist() == [0, 255]


def test_unusable_photos_are_reported(tmp_path: Path) -> None:
    write(tmp_path, [str(i) for i in range(20)])
    (tmp_path / "masks" / "3.png").unlink()
    (tmp_path / "masks" / "5.png").write_bytes(b"no image")
    (tmp_path / "images" / "7.jpg").write_bytes(b"no image")
    Image.new("L", (9, 9)).save(tmp_path / "masks" / "8.png")
    data = labelled_set(tmp_path)
    assert sorted((path.stem, reason.split(":")[0]) for path, reason in data.skipped.items()) == [
        ("3", f"no mask with its name in {tmp_path / 'masks'}"),
        ("5", "its mask"),
    ]
    both = {**data.train.masks, **data.val.masks}
    part = {path.stem: data.train if path in data.train.masks else data.val for path in both}
    assert "not an image" in part["7"].read(tmp_path / "images" / "7.jpg", DEFAULTS)
    assert "its mask 9x9" in part["8"].read(tmp_path / "images" / "8.jpg", DEFAULTS)


def test_too_few_photos_or_classes_are_an_error(tmp_path: Path) -> None:
    write(tmp_path / "one", ["1"])
    write(tmp_path / "flat", [str(i) for i in range(20)], (0, 0))
    for name, words in (
        ("one", "expected photos for both, and two classes"),
        ("flat", "of 1 classes"),
        ("gone", "does not exist"),
    ):
        with pytest.raises(DinoError, match=words):
            labelled_set(tmp_path / name)
