from __future__ import annotations

from pathlib import Path

import pytest

from dinocli.core.errors import DinoError
from dinocli.data.sources.kinds import kind_of, not_beside, unread
from dinocli.data.sources.open import image_folder


def test_a_kind_is_the_suffix_that_tells() -> None:
    names = [
        "a.HEIC",
        "b.nii.gz",
        "c.tar.gz",
        "1.2.840.10008",
        "README",
        "IM0001",
        "x.safetensors",
        "Dr. who is this man",
    ]
    assert [kind_of(n) for n in names] == [".heic", ".nii.gz", ".tar.gz", "", ".txt", "", ".safetensors", ""]
    assert unread({".mp4": 3, ".heic": 12, "": 1, ".zip": 1}) == "12 .heic, 3 .mp4, 1 without a suffix, 1 .zip"
    assert unread({f".a{i}": 1 for i in range(10)}).endswith("2 of 2 other kinds")
    assert not_beside({".txt": 5, ".heic": 1}) == {".heic": 1}


@pytest.mark.parametrize(
    ("files", "seen", "hint"),
    [
        (["a.heic", "b.HEIC", "c.mp4"], "2 .heic, 1 .mp4", "convert them to JPEG"),
        (["a.CR2"], "1 .cr2", "develop"),
        (["a.dcm"], "1 .dcm", "DICOM"),
        (["1.2.3"], "1 without a suffix", "DICOM"),
        (["a.zip"], "1 .zip", "unzip"),
        (["a.mov"], "1 .mov", "ffmpeg"),
        (["below/a.tar"], "1 .tar", "shards"),
        (["notes.txt"], "1 .txt", "name a folder"),
    ],
)
def test_a_folder_of_other_kinds_alone_names_them(tmp_path: Path, files: list[str], seen: str, hint: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"\0" * 128 + b"DICM")
    with pytest.raises(DinoError) as error:
        image_folder(tmp_path)
    assert f"it holds {seen}" in error.value.message
    assert hint in error.value.hint


def test_other_kinds_are_counted_in_one_line(tmp_path: Path) -> None:
    for name in (
        "a.jpg",
        "b.heic",
        "c/d.heic",
        "e.mp4",
        "notes.txt",
        "f.xml",
        "._g.heic",
        "__MACOSX/h.jpg",
        "@eaDir/a.jpg/t.jpg",
        "i.npy",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    source = image_folder(tmp_path)
    assert list(source.names) == ["a.jpg"]
    assert source.notes == ("not read: 2 .heic, 1 .mp4, 1 .npy",)
