from __future__ import annotations

from pathlib import Path

import pytest

from dinocli.core.errors import DinoError
from dinocli.data.decode.extras import VIDEO, Extra
from dinocli.data.sources.frames import is_video
from dinocli.data.sources.kinds import kind_of, not_beside, remedy, unread
from dinocli.data.sources.listing import PLAIN
from dinocli.data.sources.open import image_folder, photos
from dinocli.data.sources.photos import named_photos


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Act as if no extra were installed."""
    monkeypatch.setattr(Extra, "installed", False)
    monkeypatch.setattr("dinocli.data.sources.open.SUFFIXES", PLAIN)


def test_a_kind_is_the_suffix_in_lower_case() -> None:
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
        (["a.heic", "b.HEIC", "c.mp4"], "2 .heic, 1 .mp4", "pip install 'dinocli[heic]'"),
        (["a.jxl"], "1 .jxl", "pip install 'dinocli[jxl]'"),
        (["a.CR2"], "1 .cr2", "pip install 'dinocli[raw]'"),
        (["a.dcm"], "1 .dcm", "pip install 'dinocli[medical]'"),
        (["1.2.3", "IM0001"], "2 .dcm", "pip install 'dinocli[medical]'"),
        (["a.zip"], "1 .zip", "name an archive itself"),
        (["a.7z"], "1 .7z", "unpack"),
        (["a.mov"], "1 .mov", "pip install 'dinocli[video]'"),
        (["below/a.tar"], "1 .tar", "shards"),
        (["notes.txt"], "1 .txt", "name a folder"),
    ],
)
def test_the_error_for_a_folder_without_images_counts_other_kinds_and_suggests_a_remedy(
    tmp_path: Path, plain: None, files: list[str], seen: str, hint: str
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"\0" * 128 + b"DICM")
    with pytest.raises(DinoError) as error:
        image_folder(tmp_path)
    assert f"it holds {seen}" in error.value.message
    assert hint in error.value.hint


def test_other_kinds_are_counted_with_the_extra_that_reads_them(tmp_path: Path, plain: None) -> None:
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
    assert source.notes == (
        "not read: 2 .heic; pip install 'dinocli[heic]' reads them",
        "not read: 1 .mp4; pip install 'dinocli[video]' reads them",
        "not read: 1 .npy",
    )
    assert photos([tmp_path]).notes == source.notes, "of folders of photos too"
    notes: list[str] = []
    assert list(named_photos([tmp_path], notes)) == [tmp_path / "a.jpg"] and tuple(notes) == source.notes


def test_an_extra_that_is_installed_takes_its_files(tmp_path: Path) -> None:
    pytest.importorskip("pillow_heif")
    for name in ("a.jpg", "b.HEIC", "c.hif", "d.mp4"):
        (tmp_path / name).touch()
    source = image_folder(tmp_path)
    assert list(source.names) == ["a.jpg", "b.HEIC", "c.hif"] and source.notes == ("not read: 1 .mp4",)


def test_a_suggestion_without_an_example_names_the_folder() -> None:
    assert remedy("a b", {".tar": 1}, {}).endswith("or 'a b/**/*.tar'")


def test_suggested_videos_are_those_that_commands_read() -> None:
    assert {".mts", ".m2ts", ".flv", ".3gp"} <= VIDEO.suffixes
    assert all(is_video(Path(f"film{suffix}")) for suffix in VIDEO.suffixes)
