from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinocli.core.errors import DinoError
from dinocli.data.decode.pixels import BadImage
from dinocli.data.sources.masks import MaskFolder, read_index, read_object, read_objects, with_masks


def save(path: Path, values: list[list[int]], mode: str = "L") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.array(values, dtype=np.uint8))
    if mode == "P":
        image.putpalette([200, 0, 0] * 256)  # colors that differ from the numbers
    (image.convert("1") if mode == "1" else image).save(path)
    return path


def test_masks_are_found_by_relative_path_or_by_unique_name(tmp_path: Path) -> None:
    for name in ("a/1.png", "b/1.png", "b/2.png", "c/v1.5.png"):
        save(tmp_path / name, [[0]])
    masks = MaskFolder(tmp_path)
    assert masks.of(Path("b/1")) == tmp_path / "b" / "1.png"
    assert masks.of(Path("2")) == tmp_path / "b" / "2.png"
    assert masks.of(Path("elsewhere/2")) == tmp_path / "b" / "2.png"
    assert masks.of(Path("v1.5")) == tmp_path / "c" / "v1.5.png"
    assert masks.of(Path("1")) is None, "the name is not unique"
    save(tmp_path / "d" / "7_mask.png", [[0]])
    assert MaskFolder(tmp_path).of(Path("d/7")) == tmp_path / "d" / "7_mask.png"
    pairs, alone = with_masks({Path("x/2.jpg"): Path("2"), Path("x/3.jpg"): Path("3")}, masks)
    assert pairs == {Path("x/2.jpg"): tmp_path / "b" / "2.png"}
    assert list(alone) == [Path("x/3.jpg")]
    with pytest.raises(DinoError, match="does not exist"):
        MaskFolder(tmp_path / "gone")


def test_object_masks_are_bright_or_numbered_pixels(tmp_path: Path) -> None:
    assert read_object(save(tmp_path / "a.png", [[0, 127, 128, 255]])).tolist() == [[False, False, True, True]]
    assert read_object(save(tmp_path / "b.png", [[0, 1, 2]])).tolist() == [[False, True, True]]
    assert read_object(save(tmp_path / "c.png", [[0, 1, 200]], "P")).tolist() == [[False, True, True]]
    assert read_object(save(tmp_path / "d.png", [[0, 255]], "1")).tolist() == [[False, True]]
    assert not read_object(save(tmp_path / "e.png", [[0, 0]])).any()


def test_an_index_mask_gives_its_numbers_and_other_files_a_reason(tmp_path: Path) -> None:
    assert read_index(save(tmp_path / "a.png", [[0, 1, 7, 255]], "P")).tolist() == [[0, 1, 7, 255]]
    assert read_index(save(tmp_path / "b.png", [[0, 1, 7, 255]])).tolist() == [[0, 1, 7, 255]]
    assert read_index(save(tmp_path / "many.png", [list(range(256))])).tolist() == [list(range(256))], "of many classes"
    Image.new("RGB", (2, 2), (200, 0, 0)).save(tmp_path / "c.png")
    (tmp_path / "d.png").write_bytes(b"no image")
    for name, words in (("c.png", "its pixels are RGB"), ("d.png", "damaged"), ("gone.png", "No such file")):
        for read in (read_index, read_object):
            bad = read(tmp_path / name)
            assert isinstance(bad, BadImage)
            assert words in bad.reason


def test_a_gray_mask_saved_as_rgb_is_read_as_gray(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 1, 255]], np.uint8)).convert("RGB").save(tmp_path / "a.png")
    assert read_index(tmp_path / "a.png").tolist() == [[0, 1, 255]]
    assert read_object(tmp_path / "a.png").tolist() == [[False, False, True]]


def test_a_huge_mask_is_refused_before_decoding(tmp_path: Path) -> None:
    Image.new("1", (13_000, 12_000)).save(tmp_path / "huge.png")
    for read in (read_index, read_object):
        bad = read(tmp_path / "huge.png")
        assert isinstance(bad, BadImage) and bad.reason == "too large: over 150 megapixels"


def jpeg(path: Path, inside: int, quality: int = 75) -> Path:
    """Write a disk of one value on black as a JPEG, which has ringing around the edge."""
    y, x = np.mgrid[:64, :64]
    Image.fromarray(np.where((y - 32) ** 2 + (x - 30) ** 2 < 300, inside, 0).astype(np.uint8)).save(
        path, quality=quality
    )
    return path


def test_a_jpeg_mask_is_one_object_or_refused(tmp_path: Path) -> None:
    y, x = np.mgrid[:64, :64]
    disk = (y - 32) ** 2 + (x - 30) ** 2 < 300
    path = jpeg(tmp_path / "a.jpg", 255)
    assert len(np.unique(np.asarray(Image.open(path)))) > 10, "many values besides the two"
    assert (read_object(path) == disk).mean() > 0.99, "above half of white; an edge may move by a pixel"
    assert read_index(path) == BadImage("no label map: JPEG changes values; save the mask as PNG")
    number = read_object(jpeg(tmp_path / "b.jpg", 40))
    assert number == BadImage("no mask: JPEG changes values and none is above 127; save the mask as PNG")
    assert not read_object(jpeg(tmp_path / "c.jpg", 0)).any(), "black: no object"


def test_a_16_bit_mask_is_black_and_white_or_numbers_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    for values, wanted in (
        ([0, 65535, 0, 40000], [False, True, False, True]),
        ([0, 255, 128, 127], [False, True, True, False]),
        ([0, 1, 2, 127], [False, True, True, True]),
    ):
        Image.fromarray(np.array([values], np.uint16)).save(path)
        assert read_object(path).tolist() == [wanted]
    Image.fromarray(np.array([[0, 300]], np.uint16)).save(path)
    bad = read_object(path)
    assert isinstance(bad, BadImage) and "its largest value is 300" in bad.reason
    Image.fromarray(np.array([[0.0, np.nan]], np.float32)).save(tmp_path / "b.tif")
    bad = read_object(tmp_path / "b.tif")
    assert isinstance(bad, BadImage) and "the value nan" in bad.reason
    Image.fromarray(np.array([[0.0, 1.0]], np.float32)).save(tmp_path / "b.tif")
    assert read_object(tmp_path / "b.tif").tolist() == [[False, True]]


def test_each_number_of_a_mask_is_an_object_and_a_bright_mask_is_one(tmp_path: Path) -> None:
    numbered = read_objects(save(tmp_path / "a.png", [[0, 1, 2], [0, 1, 1]]))
    assert [one.tolist() for one in numbered] == [
        [[False, True, False], [False, True, True]],
        [[False, False, True], [False] * 3],
    ]
    soft = read_objects(save(tmp_path / "b.png", [[0, 100, 255]]))
    assert [one.tolist() for one in soft] == [[[False, False, True]]], "grey values of a soft edge are no objects"
    void = read_objects(save(tmp_path / "c.png", [[0, 3, 255]], "P"))
    assert [one.tolist() for one in void] == [[[False, True, False]]]
    assert read_objects(save(tmp_path / "d.png", [[0, 0]])) == BadImage("it has no object")
    (tmp_path / "e.png").write_bytes(b"no image")
    assert isinstance(read_objects(tmp_path / "e.png"), BadImage)
