from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from dinocli.core import atomic as module
from dinocli.core.atomic import atomic, atomic_folder, write_json, write_text
from dinocli.core.checksums import unseal
from dinocli.core.drafts import sweep
from dinocli.core.tensors import write_tensors


def test_a_file_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    with atomic(path) as draft:
        draft.write_text("half")
        assert not path.exists()
    assert path.read_text() == "half"
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_keeps_the_earlier_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError), atomic(path) as draft:
        draft.write_text("new")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_replaced_when_complete_and_kept_after_a_failure(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder"
    for text in ("one", "two"):
        with atomic_folder(path) as draft:
            write_text(draft / f"{text}.txt", text)
        assert [p.name for p in path.iterdir()] == [f"{text}.txt"]
    with pytest.raises(RuntimeError), atomic_folder(path) as draft:
        write_text(draft / "three.txt", "three")
        raise RuntimeError
    assert [p.name for p in path.iterdir()] == ["two.txt"]
    assert list(path.parent.iterdir()) == [path]


def test_written_files_have_the_permissions_of_the_umask(tmp_path: Path) -> None:
    write_tensors(tmp_path / "t.safetensors", {"x": np.zeros(3)}, {})
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "t.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_file_names_that_are_not_utf8_are_written_byte_by_byte(tmp_path: Path) -> None:
    write_text(tmp_path / "names", b"bad\xff.jpg".decode("utf-8", "surrogateescape"))
    assert (tmp_path / "names").read_bytes() == b"bad\xff.jpg"


def test_views_into_an_array_are_written_with_their_own_values(tmp_path: Path) -> None:
    values = np.arange(24.0).reshape(4, 6)
    write_tensors(tmp_path / "t.safetensors", {"part": values[:, 2:], "turned": values.T, "one": np.array(3)}, {})
    read = load_file(tmp_path / "t.safetensors")
    np.testing.assert_array_equal(read["part"], values[:, 2:])
    np.testing.assert_array_equal(read["turned"], values.T)
    assert read["one"].shape == ()


def test_equal_tensors_give_equal_bytes_that_safetensors_reads(tmp_path: Path) -> None:
    kinds = ["float64", "float32", "float16", "int64", "int32", "int8", "uint8", "bool"]
    tensors = {f"ä{kind}": np.arange(7).reshape(7, 1).astype(kind) for kind in kinds}
    tensors |= {"none": np.zeros((0, 3)), "big": np.arange(3, dtype=">f4")}
    metadata = {letter: letter * 3 for letter in "qwertyuiop"}
    reordered = [dict(reversed(list(values.items()))) for values in (tensors, metadata)]
    write_tensors(tmp_path / "a", tensors, metadata)
    write_tensors(tmp_path / "b", *reordered)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    read = load_file(tmp_path / "a")
    assert read.keys() == tensors.keys()
    for name, values in tensors.items():
        np.testing.assert_array_equal(read[name], values)
        assert read[name].dtype == values.dtype.newbyteorder("=")
    with safe_open(tmp_path / "a", framework="numpy") as file:
        assert file.metadata() == metadata
    write_tensors(tmp_path / "c", {}, {})
    assert load_file(tmp_path / "c") == {}


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """Limit files to 1000 bytes: like a full disk, this raises an error that names no file.

    The limit also applies to the file to which pytest may write its report, so lift it before the test ends.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_an_error_names_the_target_path_and_leaves_no_files(tmp_path: Path) -> None:
    for path in (tmp_path / "a" / "b" / "t", tmp_path / "t"):
        with full_disk(), pytest.raises(OSError) as error:
            write_tensors(path, {"x": np.zeros(10_000)}, {})
        assert (error.value.errno, error.value.filename) == (errno.EFBIG, str(path))
    with full_disk(), pytest.raises(OSError) as error, atomic_folder(tmp_path / "a" / "folder") as draft:
        write_tensors(draft / "t", {"x": np.zeros(10_000)}, {})
    assert error.value.filename == str(tmp_path / "a" / "folder")
    (tmp_path / "taken").mkdir()
    with pytest.raises(IsADirectoryError) as error:
        write_text(tmp_path / "taken", "")
    assert error.value.filename == str(tmp_path / "taken")
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


def test_errors_that_are_not_about_the_draft_are_raised_unchanged(tmp_path: Path) -> None:
    for failure in (OSError(errno.ENOENT, "no", "photo.jpg"), OSError(errno.EMFILE, "too many"), OSError("words")):
        with pytest.raises(OSError) as error, atomic(tmp_path / "t"):
            raise failure
        assert error.value is failure


def test_a_folder_does_not_replace_a_file_or_a_link(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "mine")
    write_text(tmp_path / "folder" / "file", "mine")
    (tmp_path / "link").symlink_to("folder")
    (tmp_path / "nowhere").symlink_to("gone")
    before = {path: path.lstat() for path in tmp_path.rglob("*")}
    for name in ("file", "link", "nowhere"):
        with pytest.raises(NotADirectoryError) as error, atomic_folder(tmp_path / name) as draft:
            write_text(draft / "x", "")
        assert error.value.filename == str(tmp_path / name)
    assert {path: path.lstat() for path in tmp_path.rglob("*")} == before


def test_a_folder_that_cannot_be_replaced_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "folder" / "old", "")
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path.name == "folder" and path.parent != tmp_path:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    monkeypatch.setattr(module, "_exchange", lambda one, other: False)
    with pytest.raises(OSError, match="Input/output"), atomic_folder(tmp_path / "folder") as draft:
        write_text(draft / "new", "")
    assert [p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.rglob("*"))] == ["folder", "folder/old"]


@pytest.mark.parametrize("exchanged", [True, False])
def test_a_kill_at_any_call_leaves_the_old_or_the_new_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanged: bool
) -> None:
    """Kill a child process after the first, second, ... call that changes the file system, then sweep its folder."""
    if not exchanged:
        monkeypatch.setattr(module, "_exchange", lambda one, other: False)
    outcomes = set()
    for last in range(20):
        folder = tmp_path / str(last)
        write_text(folder / "data" / "old", "")
        child = os.fork()
        if not child:
            calls = count()
            for name in ("rename", "unlink", "rmdir", "mkdir"):
                monkeypatch.setattr(Path, name, kill_after(getattr(Path, name), calls, last))
            monkeypatch.setattr(module, "_exchange", kill_after(module._exchange, calls, last))
            with atomic_folder(folder / "data") as draft:
                (draft / "new").touch()
            os._exit(0)
        os.waitpid(child, 0)
        sweep(folder)
        left = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.name.startswith(".dinocli")}
        assert left in ({"data", "data/old"}, {"data", "data/new"}), last
        outcomes |= left
    assert outcomes == {"data", "data/old", "data/new"}


def kill_after(function: Callable[..., object], calls: Iterator[int], last: int) -> Callable[..., object]:
    """Wrap a function to kill this process after call number `last`, counted over all wrapped functions."""

    def call(*arguments: object, **options: object) -> object:
        result = function(*arguments, **options)
        if next(calls) == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return call


def test_links_at_predictable_temporary_names_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    for name in (f".f.{os.getpid()}.part", f".f.{os.getpid()}.old"):
        (tmp_path / name).symlink_to("mine")
    write_text(tmp_path / "f", "new")
    assert (tmp_path / "mine").read_text() == "mine"
    assert (tmp_path / "f").read_text() == "new"


def test_json_is_written_with_its_checksum(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": [1, "ü"]}, indent=1)
    assert unseal((tmp_path / "a.json").read_bytes()) == {"x": [1, "ü"]}
