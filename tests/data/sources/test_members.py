from __future__ import annotations

import json

import pytest

from dinocli.core.errors import DinoError
from dinocli.data.decode.extras import Extra
from dinocli.data.sources.listing import PLAIN
from dinocli.data.sources.members import select_images

WHOLE = json.dumps({"written by dino": "x", "files": None}).encode()
SOME = json.dumps({"written by dino": "x", "files": ["sheet.png"]}).encode()


def selected(members: dict[str, bytes] | list[str]):
    contents = members if isinstance(members, dict) else dict.fromkeys(members, b"")
    return select_images("x.zip", list(contents), lambda row, most: list(contents.values())[row][:most])


def test_members_are_named_and_labelled_as_in_a_folder() -> None:
    found = selected(["photos/", "photos/dog/b.jpg", "photos/cat/deep/a.PNG", "photos/dog/a.jpg", "photos/notes.txt"])
    assert list(found.names) == ["cat/deep/a.PNG", "dog/a.jpg", "dog/b.jpg"]
    assert (found.rows.tolist(), found.classes, found.labels.tolist()) == ([2, 3, 1], ["cat", "dog"], [0, 1, 1])
    assert not found.notes


@pytest.mark.parametrize(
    ("members", "names"),
    [
        (["b.jpg", "a.jpg"], ["a.jpg", "b.jpg"]),
        (["p/b.jpg", "p/a.jpg"], ["a.jpg", "b.jpg"]),
        (["ab/1.jpg", "ac/1.jpg"], ["ab/1.jpg", "ac/1.jpg"]),  # a shared beginning is no shared folder
        (["a/1.jpg", "a/b/2.jpg"], ["1.jpg", "b/2.jpg"]),
        (["./a/1.jpg", "./b/2.jpg"], ["a/1.jpg", "b/2.jpg"]),
        (["__MACOSX/a/._1.jpg", "a/.hidden/2.jpg", "a/1.jpg"], ["1.jpg"]),
        (["a.npy", "a.jpg"], ["a.jpg"]),
        (["a.npy", "b.npy"], ["a.npy", "b.npy"]),
    ],
)
def test_names(members: list[str], names: list[str]) -> None:
    assert list(selected(members).names) == names


def test_the_last_of_two_members_with_a_name_counts() -> None:
    found = select_images("x.tar", ["a.jpg", "b.jpg", "a.jpg"], lambda row, most: b"")
    assert found.rows.tolist() == [2, 1]


def test_other_files_are_counted() -> None:
    found = selected(["a/1.jpg", "b/film.mp4", "b/x.npy", "b/y.psd", "notes.txt"])
    assert found.notes == (
        "not read in x.zip: 1 .npy, 1 .psd",
        "not read in x.zip: 1 .mp4; slices, frames and tiles are read from local folders: unpack or copy the files",
    )
    with pytest.raises(DinoError, match=r"no images in x\.zip: it holds 2 \.psd, 1 \.txt"):
        selected(["2.psd", "3.psd", "n.txt"])
    with pytest.raises(DinoError, match="it holds nothing"):
        selected(["folder/"])


def test_the_package_that_would_read_other_files_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Extra, "installed", False)
    monkeypatch.setattr("dinocli.data.sources.members.SUFFIXES", PLAIN)
    found = selected(["a/1.jpg", "a/2.heic", "a/3.heic", "a/4.psd"])
    assert found.notes == (
        "not read in x.zip: 2 .heic; pip install 'dinocli[heic]' reads them",
        "not read in x.zip: 1 .psd",
    )
    with pytest.raises(DinoError, match=r"it holds 1 \.nii\.gz") as error:
        selected(["a.nii.gz"])
    assert "unpack or copy the files" in error.value.hint, "packages read slices in local folders only"


def test_outputs_of_this_tool_are_ignored_by_their_marker() -> None:
    found = selected(
        {"p/cat/1.jpg": b"", "p/features/1.jpg": b"", "p/attention/.dinocli": WHOLE, "p/attention/heads/1.png": b"",
         "p/dog/.dinocli": SOME, "p/dog/sheet.png": b"", "p/dog/2.jpg": b""}
    )  # fmt: skip
    assert list(found.names) == ["cat/1.jpg", "dog/2.jpg", "features/1.jpg"]
    assert found.notes == ("ignoring p/attention/, p/dog/sheet.png in x.zip: written by dino",)
