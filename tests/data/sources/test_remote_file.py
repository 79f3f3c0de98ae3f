from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from remote_servers import Handler, cached

from dinocli.core.errors import DinoError
from dinocli.data.sources.regular import Refused
from dinocli.data.sources.remote_file import RemoteFile

pytest.importorskip("fsspec")
pytestmark = pytest.mark.usefixtures("own_cache")

Web = tuple[str, dict[str, list[str]], Path]


@pytest.fixture(name="film")
def written(web: Web, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """Write `film.bin`, of 10,240 bytes without a pattern, to a server that sends only the requested bytes."""
    monkeypatch.setattr(Handler, "ranges", True)
    monkeypatch.setattr(Handler, "asked", [])
    data = random.Random(0).randbytes(10_240)
    (web[2] / "film.bin").write_bytes(data)
    return data


def test_any_part_is_that_of_the_file(web: Web, film: bytes) -> None:
    file, draw = RemoteFile(f"{web[0]}/film.bin", block=1000), random.Random(1)
    assert file.size == len(film)
    for _ in range(60):
        start, count = draw.randrange(len(film) + 50), draw.randrange(1, 4000)
        assert file.seek(start) == start
        assert file.read(count) == film[start : start + count]
        assert file.tell() == max(start, min(start + count, len(film)))
    assert file.seek(-7, os.SEEK_END) == len(film) - 7
    assert file.read() == film[-7:]
    assert (file.read(5), file.read()) == (b"", b"")


def test_neighbouring_blocks_take_one_request_and_kept_ones_none(web: Web, film: bytes, tmp_path: Path) -> None:
    address = f"{web[0]}/film.bin"
    RemoteFile(address, block=1000).read(10)
    assert Handler.asked == [("/photos/film.bin", 0, 999)]
    file = RemoteFile(address, block=1000)
    assert file.read(4500) == film[:4500]
    assert Handler.asked[1:] == [("/photos/film.bin", 1000, 4999)]
    assert RemoteFile(address, block=1000).readall() == film
    assert Handler.asked[2:] == [("/photos/film.bin", 5000, 10_239)]
    assert len(cached(tmp_path)) == 11
    cached(tmp_path)[0].write_bytes(b"half a block")
    assert RemoteFile(address, block=1000).readall() == film
    assert len(Handler.asked) == 4


def test_no_more_blocks_are_held_than_asked(web: Web, film: bytes) -> None:
    for held in (0, 3):
        file = RemoteFile(f"{web[0]}/film.bin", block=1000, held=held)
        assert file.readall() == film
        assert len(file._held) == held


def test_a_cut_answer_is_asked_for_again(web: Web, film: bytes, tmp_path: Path) -> None:
    file = RemoteFile(f"{web[0]}/film.bin", block=4000)
    web[1]["/photos/film.bin"] = ["500", "cut", "503"]
    assert file.readall() == film
    web[1]["/photos/film.bin"] = ["500"] * 9
    for path in cached(tmp_path):
        path.unlink()
    with pytest.raises(DinoError, match=r"film\.bin cannot be read after 5 attempts"):
        RemoteFile(f"{web[0]}/film.bin", block=4000).readall()
    assert not cached(tmp_path)


def test_a_server_that_always_sends_all_is_read_once(
    web: Web, film: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Handler, "ranges", False)
    file = RemoteFile(f"{web[0]}/film.bin", block=1000)
    assert (file.seek(2500), file.read(10)) == (2500, film[2500:2510])
    web[1]["/photos/film.bin"] = ["500"] * 9
    assert (file.seek(0), file.readall()) == (0, film)


def test_a_changed_file_is_named_and_a_replaced_one_read_anew(web: Web, film: bytes) -> None:
    address, path = f"{web[0]}/film.bin", web[2] / "film.bin"
    file = RemoteFile(address, block=4000)
    assert file.read(10) == film[:10]
    path.write_bytes(film[:5000])
    with pytest.raises(Refused, match=r"changed: http.*/film\.bin has 5000 bytes, and had 10240 when it was opened"):
        file.readall()
    path.write_bytes(film * 2)  # a range of it is as long as that of the first file
    with pytest.raises(Refused, match=r"changed: http.*/film\.bin has 20480 bytes, and had 10240"):
        file.readall()
    path.write_bytes(film[::-1])
    os.utime(path, (1e9, 1e9))
    with pytest.raises(Refused, match=r"changed: http.*/film\.bin was replaced after it was opened"):
        file.readall()
    assert RemoteFile(address, block=4000).readall() == film[::-1]


def test_without_a_version_nothing_is_kept(
    web: Web, film: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Handler, "date_time_string", lambda self, timestamp=None: "")
    assert RemoteFile(f"{web[0]}/film.bin", block=1000).readall() == film
    assert not cached(tmp_path)


def test_a_missing_file_is_not_found(web: Web) -> None:
    with pytest.raises(FileNotFoundError):
        RemoteFile(f"{web[0]}/none.bin")
