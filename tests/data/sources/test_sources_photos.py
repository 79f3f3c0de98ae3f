from __future__ import annotations

import io
from pathlib import Path

import pytest
from conftest import write_images
from PIL import Image

from dinocli.core.errors import DinoError
from dinocli.data.decode.pixels import BadImage
from dinocli.data.images import DEFAULTS
from dinocli.data.sources.open import photos
from dinocli.data.sources.photos import display_pixels, named_photos, read_photo, spare


def test_files_and_folders_get_names_that_differ(tmp_path: Path) -> None:
    write_images(tmp_path / "tree" / "a", 1)
    write_images(tmp_path / "tree" / "b", 1)
    write_images(tmp_path, 2)
    (tmp_path / "0000.png").rename(tmp_path / "0001.jpg")  # the content decides the format
    names = named_photos([tmp_path / "0001.jpg", tmp_path / "0001.png", tmp_path / "tree"])
    assert {path.relative_to(tmp_path).as_posix(): name.as_posix() for path, name in names.items()} == {
        "0001.jpg": "0001_jpg",
        "0001.png": "0001_png",
        "tree/a/0000.png": "a/0000",
        "tree/b/0000.png": "b/0000",
    }
    again = named_photos([tmp_path / "tree" / "a" / "0000.png", tmp_path / "tree" / "b" / "0000.png"])
    assert len(set(again.values())) == 2


def test_a_missing_photo_is_an_error_and_an_unreadable_one_a_reason(tmp_path: Path) -> None:
    with pytest.raises(DinoError, match=r"gone.jpg does not exist"):
        named_photos([tmp_path / "gone.jpg"])
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    assert isinstance(read_photo(tmp_path / "bad.jpg", DEFAULTS), BadImage)
    gone = read_photo(tmp_path / "gone.jpg", DEFAULTS)
    assert isinstance(gone, BadImage)
    assert gone.reason == "cannot be opened: No such file or directory"
    pixels = read_photo(write_images(tmp_path / "good", 1) / "0000.png", DEFAULTS)
    assert pixels.shape == (32, 32, 3)


def test_outputs_never_overwrite_inputs(tmp_path: Path) -> None:
    photo = write_images(tmp_path / "photos", 1) / "0000.png"
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    spare([tmp_path / "new.png", photo], [tmp_path / "other.png"])
    with pytest.raises(DinoError, match=r"link/0000.png is an input, and the output would overwrite it"):
        spare([tmp_path / "link" / "0000.png"], [photo])


def test_a_large_photo_is_decoded_smaller(tmp_path: Path) -> None:
    data = io.BytesIO()
    Image.new("RGB", (1600, 1200)).save(data, format="JPEG")
    assert display_pixels(data.getvalue(), 100).shape == (150, 200, 3)
    assert isinstance(display_pixels(b"torn", 100), BadImage)


def test_a_list_names_its_photos_below_their_common_folder(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        write_images(tmp_path / "data" / name, 2, 8)
    chosen = [tmp_path / "data" / name for name in ("cat/0001.png", "dog/0001.png")]
    for lines in (chosen, [path.relative_to(tmp_path) for path in chosen]):
        (tmp_path / "list.txt").write_text("".join(f"{line}\n" for line in lines))
        assert named_photos([tmp_path / "list.txt"]) == {chosen[0]: Path("cat/0001"), chosen[1]: Path("dog/0001")}
        assert list(photos([tmp_path / "list.txt"]).names) == [str(path) for path in chosen]
