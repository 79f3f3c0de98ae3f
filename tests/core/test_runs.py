from __future__ import annotations

import os
from pathlib import Path

import pytest

from dinocli.core.runs import held, is_held, link_newest, newest_run, next_folder


def test_run_folders_are_numbered_and_the_newest_run_is_the_one_written_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert next_folder("tiny") == Path("runs/tiny-1")
    assert newest_run() is None
    for i, name in enumerate(("tiny-2", "tiny-10", "tiny-x", "mine")):
        path = tmp_path / "runs" / name / "ckpt.safetensors"
        path.parent.mkdir(parents=True)
        path.write_text("")
        os.utime(path, (100 - i, 100 - i))
    assert next_folder("tiny") == Path("runs/tiny-11")
    assert newest_run() == Path("runs/tiny-2")


def test_link_newest_links_the_weights_but_keeps_a_file_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runs = [tmp_path / "runs" / name / "ckpt.safetensors" for name in ("a", "b")]
    for path in runs:
        path.parent.mkdir(parents=True)
        path.write_text(path.parent.name)
    link = tmp_path / "ckpt.safetensors"
    for path in runs:
        assert link_newest(path)
        assert link.read_text() == path.parent.name
    assert not Path(os.readlink(link)).is_absolute(), "the folder can be moved with its runs"
    link.unlink()
    link.write_text("mine")
    assert not link_newest(runs[0])
    assert link.read_text() == "mine"


def test_link_newest_falls_back_to_a_copy_and_then_to_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").write_text("w")

    def refuse(*arguments: object) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "symlink_to", refuse)
    assert link_newest(Path("weights")), "a copy on systems without links"
    (tmp_path / "ckpt.safetensors").unlink()
    monkeypatch.setattr("shutil.copyfile", refuse)
    assert not link_newest(Path("weights"))
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


def test_the_lock_of_a_run_is_seen_and_not_kept(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert not is_held(run), "a missing folder is not in use"
    with held(run):
        assert is_held(run)
    run.mkdir(exist_ok=True)
    assert not is_held(run)
    with held(run):  # asking has not locked it
        pass
