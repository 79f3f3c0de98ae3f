from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import write_images, write_stored
from PIL import Image

from dinocli.apps.pack import pack
from dinocli.core.errors import DinoError
from dinocli.data.decode.pixels import BadImage
from dinocli.data.sources.open import image_folder, open_source
from dinocli.features.gallery import Gallery, among, belong_together, open_gallery, write_list
from dinocli.features.store import Provenance
from dinocli.features.writer import write_features


def test_splits_are_one_gallery(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_images(tmp_path / "data" / split / "cat", 2, seed=len(split))
        write_images(tmp_path / "data" / split / "dog", 1)
    paths = ["cat/0000.png", "dog/0000.png", "cat/0001.png"]
    folder = write_stored(tmp_path / "f", str(tmp_path / "data"), {"val": paths[:2], "train": paths}, ("cat", "dog"))
    gallery = open_gallery(folder)
    assert len(gallery) == 5
    np.testing.assert_array_equal(gallery.values[0:5][:, 0], [2, 3, 4, 0, 1])
    names = [gallery.name(row) for row in range(5)]
    assert names == [*(f"train/{p}" for p in paths), *(f"val/{p}" for p in paths[:2])]
    assert [gallery.label(row) for row in range(5)] == ["cat", "dog", "cat", "cat", "dog"]
    for row, name in enumerate(names):
        file = tmp_path / "data" / name
        assert gallery.file(row) == file
        assert gallery.read(row) == file.read_bytes()
        np.testing.assert_array_equal(gallery.photo(row, 32), np.asarray(Image.open(file)))
        assert gallery.size(row) == (32 * 32, file.stat().st_size)


def test_moved_photos_are_found_by_data_and_missing_ones_reported(tmp_path: Path) -> None:
    write_images(tmp_path / "new", 2)
    folder = write_stored(tmp_path / "f", str(tmp_path / "old"), {"all": ["0000.png", "gone.png"]})
    assert "does not exist" in open_gallery(folder).read(0).reason
    assert open_gallery(folder).size(0) == (0, 0)
    assert open_gallery(folder).file(0) is None
    gallery = open_gallery(folder, str(tmp_path / "new"))
    assert isinstance(gallery.read(0), bytes)
    assert isinstance(gallery.photo(1, 32), BadImage)


def test_photos_in_tar_shards_are_found(tmp_path: Path) -> None:
    data = io.BytesIO()
    Image.new("RGB", (9, 7), (1, 2, 3)).save(data, format="PNG")
    with tarfile.open(tmp_path / "x-000.tar", "w") as tar:
        for name in ("a/1.png", "a/2.png"):
            entry = tarfile.TarInfo(name)
            entry.size = len(data.getvalue())
            tar.addfile(entry, io.BytesIO(data.getvalue()))
    source = open_source(str(tmp_path / "x-000.tar"))
    names = [sample.name for sample in source.stream(0, 1)]
    gallery = open_gallery(
        write_stored(tmp_path / "f", source.where, {"all": [*names, "x-000.tar/b.png", "y.tar/a/1.png"]})
    )
    assert gallery.photo(1, 16).shape == (7, 9, 3)
    assert [isinstance(gallery.read(row), BadImage) for row in range(4)] == [False, False, True, True]
    with pytest.raises(DinoError, match="has no image files to list"):
        write_list(gallery, [0], tmp_path / "list.txt")


def test_photos_in_packed_pixels_are_found(tmp_path: Path) -> None:
    pack(image_folder(write_images(tmp_path / "in", 3)), tmp_path / "pixels", pixels=True)
    names = ["0002.png", "0000.png", "gone.png"]
    gallery = open_gallery(write_stored(tmp_path / "f", str(tmp_path / "pixels"), {"all": names}))
    for row in (0, 1):
        np.testing.assert_array_equal(gallery.photo(row, 32), np.asarray(Image.open(tmp_path / "in" / names[row])))
        assert (gallery.file(row), gallery.size(row)) == (None, (32 * 32, 0))
    assert "gone.png is not in" in gallery.read(2).reason


def test_a_written_list_can_be_opened_for_training(tmp_path: Path) -> None:
    write_images(tmp_path / "data", 4)
    odd = ["with space.png", "#1.png", "tab\t.png"]
    for name in odd:
        (tmp_path / "data" / name).write_bytes((tmp_path / "data" / "0003.png").read_bytes())
    gallery = open_gallery(write_stored(tmp_path / "f", str(tmp_path / "data"), {"all": [*odd, "0002.png"]}))
    assert write_list(gallery, [2, 0, 1, 3], tmp_path / "lists" / "keep.txt") == ["tab\t.png"]
    source = open_source(str(tmp_path / "lists" / "keep.txt"))
    assert [Path(name).name for name in source.names] == ["with space.png", "#1.png", "0002.png"]
    assert all(source.read(i) for i in range(3))


def test_galleries_of_other_weights_or_settings_are_refused(tmp_path: Path) -> None:
    first, same = (open_gallery(write_stored(tmp_path / n, f"data-{n}", {"all": ["a"]})) for n in ("a", "b"))
    belong_together(first, same)
    for change in ({"fingerprint": "9"}, {"size": 8}, {"tokens": "cls+avg"}):
        other = open_gallery(write_stored(tmp_path / "c", "data", {"all": ["a"]}, **change))
        with pytest.raises(DinoError, match="made with different"):
            belong_together(first, other)
    assert first.digest != Gallery(first.folder, first.parts | {"more": first.parts["all"]}, "x").digest


def test_a_list_of_files_selects_images_of_all_splits(tmp_path: Path) -> None:
    provenance = Provenance("c", "0" * 16, "cls", 1, 16, str(tmp_path / "data"))
    for split, count in (("train", 3), ("val", 2)):
        write_images(tmp_path / "data" / split / "a", count, 8)
        with write_features(tmp_path / "features" / f"{split}.safetensors", provenance, ["a"]) as writer:
            values = np.arange(count * 2, dtype=np.float32).reshape(count, 2) + (split == "val")
            writer.append(values, [0] * count, [f"a/{i:04}.png" for i in range(count)])
    gallery, chosen = open_gallery(tmp_path / "features"), tmp_path / "chosen.txt"
    lines = [tmp_path / "data" / name for name in ("train/a/0002.png", "val/a/0000.png")]
    chosen.write_text("".join(f"{line}\n" for line in lines))
    some = among(gallery, chosen)
    assert [some.file(row) for row in range(len(some))] == lines
    assert some.values[np.arange(2)].tolist() == [[4, 5], [1, 2]]
    assert [some.label(row) for row in range(2)] == ["a", "a"]
    chosen.write_text(f"{write_images(tmp_path / 'other', 1) / '0000.png'}\n")
    with pytest.raises(DinoError, match="none of the 1 images"):
        among(gallery, chosen)
    with pytest.raises(DinoError, match="does not exist"):
        among(gallery, tmp_path / "gone.txt")
