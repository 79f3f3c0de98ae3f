from __future__ import annotations

import errno
from pathlib import Path

import pytest

from dinocli.core.errors import DinoError
from dinocli.features.unfinished import differences, forget, record, recorded, unfinished

JOB = {"weights": "0123", "size": (16, 16)}


def begin(path: Path, job: dict = JOB, error: BaseException | None = None) -> tuple[dict | None, list[str]]:
    """Begin an extraction and save a state, unless one was saved before; return that state and the messages."""
    lines: list[str] = []
    try:
        with unfinished(path, job, lines.append) as work:
            before = work.state
            if before is None:
                (work.folder / "rows").write_bytes(b"some")
                work.save({"batches": 3})
            if error:
                raise error
    except (KeyboardInterrupt, DinoError):
        pass
    return before, lines


def test_an_interruption_keeps_the_state_for_the_same_job(tmp_path: Path) -> None:
    path = tmp_path / "new" / "train.safetensors"
    folder = path.with_name(".train.unfinished")
    state, lines = begin(path, error=KeyboardInterrupt())
    assert (state, len(lines)) == (None, 1)
    assert lines[0].startswith("unfinished: run the same command to resume")
    assert begin(path, error=KeyboardInterrupt())[0] == {"batches": 3}
    assert (folder / "rows").exists()
    state, lines = begin(path, JOB | {"weights": "4567", "views": 1}, KeyboardInterrupt())
    assert (state, lines[0]) == (
        None, f"note: starting anew: the unfinished extraction in {folder} has other views, weights"
    )  # fmt: skip
    begin(path, JOB | {"weights": "4567", "views": 1})
    assert not list(path.parent.iterdir()), "complete, so nothing is left"


def test_a_failure_before_the_first_saved_state_leaves_nothing(tmp_path: Path) -> None:
    lines: list[str] = []
    with pytest.raises(DinoError), unfinished(tmp_path / "new" / "f.safetensors", JOB, lines.append) as work:
        (work.folder / "rows").write_bytes(b"some")
        raise DinoError("too large", "use another")
    assert not (tmp_path / "new").exists()
    assert not lines


def test_a_failure_that_may_pass_keeps_the_state(tmp_path: Path) -> None:
    """For example a worker process that the system killed for lack of memory."""
    begin(tmp_path / "f.safetensors", error=DinoError("a worker process was killed", "use --workers 1"))
    assert begin(tmp_path / "f.safetensors")[0] == {"batches": 3}


def test_an_error_of_the_disk_names_the_output_and_keeps_the_state(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    with pytest.raises(OSError, match="No space") as error, unfinished(path, JOB, lambda line: None) as work:
        work.save({"batches": 1})
        raise OSError(errno.ENOSPC, "No space left on device")
    assert error.value.filename == str(path)
    assert begin(path)[0] == {"batches": 1}


def test_a_result_is_recorded_for_its_job(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    assert recorded(path, JOB) is None
    record(path, JOB, {"images": 12})
    assert recorded(path, JOB) == {"images": 12}
    assert recorded(path, {}) is None
    forget(path)
    assert recorded(path, JOB) is None
    assert not list(tmp_path.iterdir())


def test_differences_name_the_values_of_either_job() -> None:
    assert differences({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4}) == "other b, c"
    assert differences({"a": [1]}, {"a": [1]}) == ""
