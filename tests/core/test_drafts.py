from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dinocli.core import drafts
from dinocli.core.drafts import BEFORE, discard, drafting, sweep

# Script that writes a draft next to the given path, prints "ready", and waits to be killed.
WRITE = """
import os, sys, time
from pathlib import Path
os.getpid = lambda: 7  # as in containers, where processes may have the same id
from dinocli.core.drafts import drafting

with drafting(Path(sys.argv[1])) as draft:
    draft.write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""


def start_writer(path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", WRITE, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    return process


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    assert process.stdout
    process.stdout.close()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_sweep_removes_drafts_of_killed_writers_and_keeps_those_of_living_ones(tmp_path: Path) -> None:
    path = tmp_path / "file"
    killed, living = start_writer(path), start_writer(path)
    try:
        kill(killed)
        assert len(names(tmp_path)) == 2
        sweep(tmp_path)
        (left,) = tmp_path.iterdir()
        assert (left / "file").read_text() == "half"
    finally:
        kill(living)
    sweep(tmp_path)
    assert not names(tmp_path)


def test_sweep_keeps_the_users_own_files(tmp_path: Path) -> None:
    token = "0123456789abcdef"
    own = [".x.old", ".y.part", ".x.123.part", ".x.123.old", "8.123.part", f".dinocli-{token}.part", ".dinocli-x.part"]
    for name in own:
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").touch()
    (tmp_path / f".dinocli-{token[::-1]}.part").symlink_to(tmp_path / ".x.old")
    (tmp_path / ".z.part").write_text("mine")
    (tmp_path / f".dinocli-{token}.part" / ".dinocli-mark").write_text("not ours")
    os.utime(tmp_path / f".dinocli-{token}.part", (0, 0))
    before = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
    sweep(tmp_path)
    sweep(tmp_path / "missing")
    assert {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_draft_has_an_unpredictable_name_and_is_private(tmp_path: Path) -> None:
    folders = set()
    for _ in range(3):
        with drafting(tmp_path / "a.png") as draft:
            assert draft.name == "a.png"
            assert draft.parent.stat().st_mode & 0o777 == 0o700
            folders.add(draft.parent.name)
    assert len(folders) == 3
    assert not names(tmp_path)


def test_sweep_restores_the_folder_that_was_about_to_be_replaced(tmp_path: Path) -> None:
    """The writer is killed between its two renames: of the old folder into the draft, and of the new one out of it."""
    process = start_writer(tmp_path / "folder")
    (draft,) = tmp_path.iterdir()
    (draft / BEFORE).mkdir()
    (draft / BEFORE / "old").touch()
    kill(process)
    sweep(tmp_path)
    assert [p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.rglob("*"))] == ["folder", "folder/old"]


def test_drafts_of_another_machine_are_swept_only_when_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On some file systems, locks work only within one machine."""
    kill(start_writer(tmp_path / "file"))
    monkeypatch.setattr(drafts, "_read_boot_id", lambda: b"another")
    sweep(tmp_path)
    assert names(tmp_path)
    now = time.time()
    monkeypatch.setattr(drafts.time, "time", lambda: now + 7200)
    sweep(tmp_path)
    assert not names(tmp_path)


def test_sweep_finishes_a_removal_that_was_killed(tmp_path: Path) -> None:
    kill(start_writer(tmp_path / "file"))
    (draft,) = tmp_path.iterdir()
    (draft / "file").unlink()  # the mark goes last
    sweep(tmp_path)
    assert not names(tmp_path)


def test_discard_removes_a_folder(tmp_path: Path) -> None:
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    discard(tmp_path / "folder")
    assert not names(tmp_path)


def test_drafts_work_for_the_longest_file_names(tmp_path: Path) -> None:
    with drafting(tmp_path / ("n" * 255)) as draft:
        draft.touch()
        draft.rename(tmp_path / draft.name)
    assert names(tmp_path) == {"n" * 255}
