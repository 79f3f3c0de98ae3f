from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinocli.data.decode import BadImage
from dinocli.data.labels import LabelMap, read_labels, write_labels

VALUES = np.array([[0, 1, 1], [0, 7, 255]], dtype=np.uint8)


def test_numbers_and_palette_go_there_and_back(tmp_path: Path) -> None:
    palette = bytes(range(256)) * 3
    write_labels(tmp_path / "a.png", LabelMap(VALUES, palette))
    read = read_labels(tmp_path / "a.png")
    np.testing.assert_array_equal(read.values, VALUES)
    assert read.palette == palette
    assert read.objects == [1, 7]
    assert read.void.tolist() == [[False, False, False], [False, False, True]], "255 in a palette, as in DAVIS 2017"
    assert read.cleared.values.tolist() == [[0, 1, 1], [0, 7, 0]]
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == "P"


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_grey_masks_are_label_maps_however_they_were_saved(tmp_path: Path, mode: str) -> None:
    Image.fromarray(VALUES).convert(mode).save(tmp_path / "a.png")
    read = read_labels(tmp_path / "a.png")
    np.testing.assert_array_equal(read.values, VALUES)
    assert read.palette is None
    assert read.objects == [1, 7, 255] and not read.void.any()
    write_labels(tmp_path / "b.png", read)
    with Image.open(tmp_path / "b.png") as image:
        assert image.mode == "L"


def test_black_and_white_is_one_object(tmp_path: Path) -> None:
    Image.fromarray(VALUES > 1).save(tmp_path / "a.png")
    assert read_labels(tmp_path / "a.png").objects == [255]


def test_what_is_no_label_map_is_a_reason(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (30, 30, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "photo.png")
    Image.fromarray(noise[..., 0]).save(tmp_path / "grey.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    for name, why in (("photo", "its pixels are RGB"), ("grey", "values, as photos"), ("broken", "damaged")):
        found = read_labels(tmp_path / f"{name}.png")
        assert isinstance(found, BadImage) and why in found.reason
