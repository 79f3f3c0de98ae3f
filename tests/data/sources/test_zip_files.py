from __future__ import annotations

import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import write_images

from dinocli.core.errors import DinoError
from dinocli.data.images import ImagesConfig
from dinocli.data.sources.open import open_source, splits
from dinocli.data.sources.regular import Refused
from dinocli.data.sources.zip_files import ZipImages


def zipped(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def overwrite(path: Path, field: int, value: bytes, mark: bytes = b"PK\1\2") -> Path:
    """Change a field of the first member, in the directory at the end of the archive."""
    data = bytearray(path.read_bytes())
    place = data.index(mark) + field
    data[place : place + len(value)] = value
    path.write_bytes(data)
    return path


SIZE, FLAGS, METHOD = 24, 8, 10  # fields of a directory entry; source: PKWARE APPNOTE 4.3.12
DATA = bytes(1000) + np.random.default_rng(0).bytes(5000)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_archive_is_read_as_the_folder_that_it_holds(tmp_path: Path, method: int) -> None:
    for name in ("cat", "dog"):
        write_images(tmp_path / "photos" / name, 2, seed=len(name + name[0] * (name == "cat")))
    files = sorted((tmp_path / "photos").rglob("*.png"))
    path = zipped(
        tmp_path / "p.ZIP", {str(file.relative_to(tmp_path)): file.read_bytes() for file in files[::-1]}, method
    )
    source, folder = open_source(str(path)), open_source(str(tmp_path / "photos"))
    assert isinstance(source, ZipImages)
    assert (list(source.names), source.classes) == (list(folder.names), ["cat", "dog"])
    assert source.labels.tolist() == folder.labels.tolist() == [0, 0, 1, 1]
    assert [source.read(i) for i in range(4)] == [folder.read(i) for i in range(4)]
    assert list(tmp_path.iterdir()).__len__() == 2  # nothing was unpacked


def test_contents_belong_to_the_fingerprint(tmp_path: Path) -> None:
    one, other = (open_source(str(zipped(tmp_path / f"{x}.zip", {"a.jpg": x.encode()}))) for x in "xy")
    same = open_source(str(zipped(tmp_path / "z.zip", {"a.jpg": b"x"}, zipfile.ZIP_STORED)))
    assert one.fingerprint == same.fingerprint != other.fingerprint


def test_splits_of_an_archive(tmp_path: Path) -> None:
    names = ["train/cat/1.jpg", "train/dog/2.jpg", "val/cat/3.jpg", "val/dog/4.jpg"]
    found = splits(str(zipped(tmp_path / "p.zip", {f"set/{name}": name.encode() for name in names})))
    assert {name: (list(part.names), part.classes) for name, part in found.items()} == {
        "train": (["cat/1.jpg", "dog/2.jpg"], ["cat", "dog"]),
        "val": (["cat/3.jpg", "dog/4.jpg"], ["cat", "dog"]),
    }
    assert found["val"].read(1) == b"val/dog/4.jpg"
    flat = splits(str(zipped(tmp_path / "q.zip", {"test/1.jpg": b"1", "exam/1.jpg": b"2"})))
    assert flat["all"].classes == ["exam", "test"]


def test_backslashes_between_folders(tmp_path: Path) -> None:
    source = open_source(str(zipped(tmp_path / "p.zip", {"cat\\1.jpg": b"1", "dog\\1.jpg": b"2"})))
    assert source.classes == ["cat", "dog"]


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (10, "its size or checksum differs"),  # larger than the directory states: reading stops there
        (len(DATA) + 1, "its size or checksum differs"),
        (600_000_000, "too large: 600 megabytes, over 500"),
    ],
)
def test_a_member_of_another_size_than_stated_is_a_bad_image(tmp_path: Path, size: int, message: str) -> None:
    path = overwrite(zipped(tmp_path / "p.zip", {"a.jpg": DATA, "b.jpg": DATA}), SIZE, struct.pack("<I", size))
    source = open_source(str(path))
    with pytest.raises(Refused, match=message):
        source.read(0)
    assert source.read(1) == DATA


def test_the_size_limit(tmp_path: Path) -> None:
    source = open_source(str(zipped(tmp_path / "p.zip", {"a.jpg": bytes(2000)})))
    with pytest.raises(Refused, match=r"too large: 0\.002 megabytes, over 0\.001"):
        source.read(0, ImagesConfig(max_megabytes=0.001))


def test_corrupt_and_truncated_contents_are_bad_images(tmp_path: Path) -> None:
    path = zipped(tmp_path / "p.zip", {"a.jpg": DATA, "b.jpg": DATA}, zipfile.ZIP_STORED)
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    source = open_source(str(path))
    with pytest.raises(Refused, match="checksum"):
        source.read(0)
    path.write_bytes(data[:8000])
    with pytest.raises(Refused, match=r"truncated: .*p\.zip ends \d+ bytes early"):
        source.read(1)


# The archives are harmless: a few kilobytes, of which only the directory claims more.


def test_a_decompression_bomb_is_an_error(tmp_path: Path) -> None:
    path = overwrite(zipped(tmp_path / "p.zip", {"a.jpg": DATA}), SIZE, struct.pack("<I", 4 * 10**9))
    with pytest.raises(DinoError, match=r"p\.zip is a decompression bomb: 4\.0 GB in 0\.0 MB"):
        open_source(str(path))


def test_overlapping_members_are_a_bomb(tmp_path: Path) -> None:
    path = overwrite(zipped(tmp_path / "p.zip", {"a.jpg": DATA}), 20, struct.pack("<I", 10**6))
    with pytest.raises(DinoError, match=r"decompression bomb: .* so they overlap"):
        open_source(str(path))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (FLAGS, b"\1\0", r"is encrypted: a\.jpg needs a password"),
        (METHOD, b"\x09\0", r"compresses a\.jpg by deflate64"),
    ],
)
def test_members_that_cannot_be_read_are_one_error(tmp_path: Path, field: int, value: bytes, message: str) -> None:
    path = overwrite(zipped(tmp_path / "p.zip", {"a.jpg": DATA}), field, value)
    with pytest.raises(DinoError, match=message) as error:
        open_source(str(path))
    assert "7z x" in error.value.hint


def test_a_file_that_is_no_archive(tmp_path: Path) -> None:
    (tmp_path / "p.zip").write_bytes(b"x" * 100)
    with pytest.raises(DinoError, match="is not a valid ZIP archive: File is not a zip file"):
        open_source(str(tmp_path / "p.zip"))
    path = zipped(tmp_path / "q.zip", {"a.txt": b"x"})
    with pytest.raises(DinoError, match=r"no images in .*q\.zip: it holds 1 \.txt"):
        open_source(str(path))
