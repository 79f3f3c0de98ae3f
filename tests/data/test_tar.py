from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from dinocli.data.tar import LocalTar, PipedTar, Span, members
from dinocli.errors import DinoError

NAMES = ["a.jpg", "folder/" + "long" * 60 + "/ünï.png", "x" * 99 + ".cls", "empty.jpg"]


def written(path: Path, form: int) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        tar.addfile(tarfile.TarInfo("link.jpg"), None)
        for i, name in enumerate(NAMES):
            member = tarfile.TarInfo(name)
            data = b"" if name == "empty.jpg" else bytes([i]) * (700 * i + 1)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_both_readers_give_what_pythons_own_gives(tmp_path: Path, form: int) -> None:
    path = written(tmp_path / "a.tar", form)
    with tarfile.open(path) as tar:
        expected = [(m.name, tar.extractfile(m).read()) for m in tar.getmembers() if m.isfile()]
    local, piped = LocalTar(str(path)), PipedTar(f"pipe:cat {path}")
    spans = [(name, span) for name, span in members(local)]
    whole = path.read_bytes()
    assert [(name, whole[span.offset : span.offset + span.size]) for name, span in spans] == expected
    assert all(isinstance(span, Span) for _, span in spans)
    assert list(members(piped)) == expected
    piped.finish()
    assert (local.torn, piped.torn) == ("", "")
    local.close()
    piped.close()


@pytest.mark.parametrize("cut", [100, 600, 1500, -1200])
def test_a_torn_file_ends_and_says_so(tmp_path: Path, cut: int) -> None:
    path = written(tmp_path / "a.tar", tarfile.GNU_FORMAT)
    path.write_bytes(path.read_bytes()[: cut if cut > 0 else -9000 + cut])
    tape = LocalTar(str(path))
    assert len(list(members(tape))) < len(NAMES) + 1
    assert tape.torn == "is torn, or no tar file"
    tape.close()


def test_a_command_that_fails_is_named() -> None:
    tape = PipedTar("pipe:false")
    list(members(tape))
    with pytest.raises(DinoError, match=r"`false`: .*exit code 1"):
        tape.finish()
    tape.close()
