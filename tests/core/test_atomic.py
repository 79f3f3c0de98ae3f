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


def test_a_file_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    with atomic(path) as draft:
        draft.write_text("half")
        assert not path.exists()
    assert path.read_text() == "half"
    assert list(path.parent.iterdir()) == [path]


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError), atomic(path) as draft:
        draft.write_text("new")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_appears_whole_or_stays_as_it_was(tmp_path: Path) -> None:
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


def test_what_is_left_can_be_read_by_others_as_any_file_of_the_users(tmp_path: Path) -> None:
    write_tensors(tmp_path / "t.safetensors", {"x": np.zeros(3)}, {})
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "t.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_names_with_any_bytes_can_be_written(tmp_path: Path) -> None:
    write_text(tmp_path / "names", b"bad\xff.jpg".decode("utf-8", "surrogateescape"))
    assert (tmp_path / "names").read_bytes() == b"bad\xff.jpg"


def test_a_view_into_an_array_is_written_as_it_reads(tmp_path: Path) -> None:
    values = np.arange(24.0).reshape(4, 6)
    write_tensors(tmp_path / "t.safetensors", {"part": values[:, 2:], "turned": values.T, "one": np.array(3)}, {})
    read = load_file(tmp_path / "t.safetensors")
    np.testing.assert_array_equal(read["part"], values[:, 2:])
    np.testing.assert_array_equal(read["turned"], values.T)
    assert read["one"].shape == ()


def test_the_same_tensors_give_the_same_bytes_which_the_library_reads(tmp_path: Path) -> None:
    kinds = ["float64", "float32", "float16", "int64", "int32", "int8", "uint8", "bool"]
    tensors = {f"ä{kind}": np.arange(7).reshape(7, 1).astype(kind) for kind in kinds}
    tensors |= {"none": np.zeros((0, 3)), "big": np.arange(3, dtype=">f4")}
    metadata = {letter: letter * 3 for letter in "qwertyuiop"}
    turned = [dict(reversed(list(values.items()))) for values in (tensors, metadata)]
    write_tensors(tmp_path / "a", tensors, metadata)
    write_tensors(tmp_path / "b", *turned)
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
    """No file may grow over 1000 bytes, which the system says as it says that a disk is full: without a name.

    Not even the one that pytest may be writing its report to, so that this must end before a test does.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_an_error_names_the_place_that_was_wanted_and_leaves_nothing(tmp_path: Path) -> None:
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


def test_an_error_of_something_else_keeps_its_name(tmp_path: Path) -> None:
    for failure in (OSError(errno.ENOENT, "no", "photo.jpg"), OSError(errno.EMFILE, "too many"), OSError("words")):
        with pytest.raises(OSError) as error, atomic(tmp_path / "t"):
            raise failure
        assert error.value is failure


def test_a_folder_takes_no_files_or_links_place(tmp_path: Path) -> None:
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


def test_a_folder_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_a_kill_at_any_call_leaves_the_old_folder_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanged: bool
) -> None:
    """A child is killed after the first, second, ... call that changes the file system; then it is swept."""
    if not exchanged:
        monkeypatch.setattr(module, "_exchange", lambda one, other: False)
    found = set()
    for last in range(20):
        folder = tmp_path / str(last)
        write_text(folder / "data" / "old", "")
        child = os.fork()
        if not child:
            calls = count()
            for name in ("rename", "unlink", "rmdir", "mkdir"):
                monkeypatch.setattr(Path, name, killing(getattr(Path, name), calls, last))
            monkeypatch.setattr(module, "_exchange", killing(module._exchange, calls, last))
            with atomic_folder(folder / "data") as draft:
                (draft / "new").touch()
            os._exit(0)
        os.waitpid(child, 0)
        sweep(folder)
        left = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.name.startswith(".dinocli")}
        assert left in ({"data", "data/old"}, {"data", "data/new"}), last
        found |= left
    assert found == {"data", "data/old", "data/new"}


def killing(function: Callable[..., object], calls: Iterator[int], last: int) -> Callable[..., object]:
    def called(*arguments: object, **options: object) -> object:
        result = function(*arguments, **options)
        if next(calls) == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return called


def test_a_planted_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    for name in (f".f.{os.getpid()}.part", f".f.{os.getpid()}.old"):
        (tmp_path / name).symlink_to("mine")
    write_text(tmp_path / "f", "new")
    assert (tmp_path / "mine").read_text() == "mine"
    assert (tmp_path / "f").read_text() == "new"


def test_json_is_written_with_its_checksum(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": [1, "ü"]}, indent=1)
    assert unseal((tmp_path / "a.json").read_bytes()) == {"x": [1, "ü"]}
