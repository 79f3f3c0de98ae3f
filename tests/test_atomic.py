from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from dinocli.atomic import atomic, atomic_folder, write_tensors, write_text


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
