from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from dinocli.cli.options import decodes, note_inside, output_place
from dinocli.core.errors import DinoError
from dinocli.data.decode import torch_codecs


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "old.zip").mkdir()
    for name in ("file", "weights.pth"):
        (tmp_path / name).write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "gone").symlink_to("nowhere")
    return tmp_path


@pytest.mark.parametrize(
    ("typed", "message", "hint"),
    [
        ("s3://bucket/x", "--out s3://bucket/x is an address; expected a local folder",
         "use --out x, and copy that to s3://bucket/x afterwards"),
        ("gs://bucket", "--out gs://bucket is an address", "use --out bucket, and copy"),
        ("hdfs://node:9000/runs/a", "--out hdfs://node:9000/runs/a is an address", "use --out a, and copy"),
        ("http://host/run.zip", "--out http://host/run.zip is an address", "use --out run, and copy"),
        ("file:///data/run", "--out file:///data/run is an address", "use --out /data/run"),
        ("me@host:runs/a", "--out me@host:runs/a is an address", "use --out a, and copy"),
        ("file", "--out file is a file; expected a folder", "use --out file-2"),
        ("weights.pth", "--out weights.pth is a file", "use --out weights"),
        ("run.zip", "--out run.zip is named like an archive", "use --out run"),
        ("runs/a.tar.gz", "--out runs/a.tar.gz is named like an archive", "use --out runs/a"),
        ("model.safetensors", "--out model.safetensors is named like a file", "use --out model"),
        ("file/run", "--out file/run is below", "use --out run"),
        ("pipe", "--out pipe is a device", "use --out pipe-2"),
        ("/dev/null", "--out /dev/null is a device", ""),
        ("gone", "--out gone is a broken link", "use --out gone-2"),
    ],
)  # fmt: skip
def test_a_folder_that_cannot_be_written_is_named(here: Path, typed: str, message: str, hint: str) -> None:
    before = sorted(here.iterdir())
    with pytest.raises(DinoError) as error:
        output_place(Path(typed))
    assert error.value.message.startswith(message)
    assert error.value.hint.startswith(hint)
    assert sorted(here.iterdir()) == before


@pytest.mark.parametrize(
    ("typed", "message", "hint"),
    [
        ("folder", "--out folder is a folder; expected a file", "use --out folder/search.png"),
        ("s3://bucket/x.png", "--out s3://bucket/x.png is an address; expected a local file",
         "use --out search.png, and copy that to s3://bucket/x.png afterwards"),
        ("x.zip", "--out x.zip is named like an archive; expected a file", "use --out search.png"),
        ("/dev/null", "--out /dev/null is a device; expected a file", "use --out search.png"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_written_is_named(here: Path, typed: str, message: str, hint: str) -> None:
    with pytest.raises(DinoError) as error:
        output_place(Path(typed), file="search.png")
    assert (error.value.message, error.value.hint) == (message, hint)


def test_an_argument_is_named_without_dashes(here: Path) -> None:
    with pytest.raises(DinoError) as error:
        output_place(Path("s3://bucket/x"), "OUT")
    assert error.value.message == "OUT s3://bucket/x is an address; expected a local folder"
    assert error.value.hint == "for OUT, name x, and copy that to s3://bucket/x afterwards"


@pytest.mark.parametrize("typed", ["folder", "new/deep/run", "run.v1", "old.zip", "a:b", ".", "folder/../x"])
def test_a_writable_folder_is_returned_unchanged(here: Path, typed: str) -> None:
    before = sorted(here.iterdir())
    assert output_place(Path(typed)) == Path(typed)
    assert sorted(here.iterdir()) == before, "nothing is written"


def test_a_tilde_is_expanded_to_the_home_folder(here: Path) -> None:
    assert output_place(Path("~/runs/a")) == here / "home" / "runs" / "a"


def test_an_existing_file_may_be_replaced(here: Path) -> None:
    assert output_place(Path("weights.pth"), file="model.pth") == Path("weights.pth")


def test_a_read_only_folder_is_an_error(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Root may write everywhere, and tests may run as root.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != here / "folder")
    with pytest.raises(DinoError, match=f"no permission to write --out folder/run: {here / 'folder'} is read-only"):
        output_place(Path("folder/run"))
    assert output_place(Path("run")) == Path("run")


def test_an_output_inside_the_images_is_said(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    note_inside(Path("runs/tiny-1"), "folder", "x.zip")
    note_inside(Path("folder2"), "folder")
    assert capsys.readouterr().err == ""
    note_inside(Path("folder/new/run"), "elsewhere", "folder")
    note_inside(Path("runs/tiny-1"), ".")
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "note: the output folder/new/run is inside the images of folder; dino never reads it as images"
    assert said[1].startswith("note: the output runs/tiny-1 is inside the images of .")


@pytest.mark.parametrize("fault", [None, "torchvision was built without nvJPEG"])
def test_a_device_without_a_decoder_is_one_note(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fault: str | None
) -> None:
    monkeypatch.setattr(torch_codecs, "why_no_jpegs", lambda device: fault)
    assert decodes(torch.device("cuda")) == (fault is None)
    note = f"note: torchvision cannot decode JPEGs on cuda; the workers decode them: {fault}"
    assert " ".join(capsys.readouterr().err.split()) == (note if fault else "")
