from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from dinocli.data.sources import listing
from dinocli.data.sources.listing import Names, list_files


def make(root: Path, names: list[str]) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def images(path: str) -> bool:
    return path.endswith(".jpg")


def test_names_are_a_sequence_of_any_bytes_in_little_memory() -> None:
    given = ["a/b.jpg", "ünïcode 漢字.png", os.fsdecode(b"\xff\xfe.jpg"), ""]
    names = Names.of(given)
    assert list(names) == given
    assert [names[i] for i in (-1, 1)] == ["", given[1]]
    assert names[1:3] == given[1:3]
    with pytest.raises(IndexError):
        names[4]
    many = Names.of([f"class{i % 1000:04}/image_{i:08}.jpeg" for i in range(10_000)])
    assert (many.text.nbytes + many.ends.nbytes) / len(many) < 40
    assert list(Names.of([])) == []


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use an empty cache folder; treat small folders as large, and new ones as settled."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(listing, "_REMEMBERED", 3)
    monkeypatch.setattr(listing, "_SETTLED", -(10**12))
    return tmp_path / "cache" / "dinocli" / "listing"


def test_a_long_listing_is_cached_until_a_folder_changes(
    tmp_path: Path, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make(tmp_path / "data", ["b/2.jpg", "a/1.jpg", "a/deep/3.jpg", "notes.txt"])
    first = list_files(root, images)
    assert list(first.names) == ["a/1.jpg", "a/deep/3.jpg", "b/2.jpg"]
    assert first.others == 1
    assert len(list(memory.iterdir())) == 1
    walked = []
    walk = listing._walk
    monkeypatch.setattr(listing, "_walk", lambda *args: walked.append(args) or walk(*args))
    assert list(list_files(root, images).names) == list(first.names)
    assert not walked
    for change in (
        lambda: make(root, ["a/deep/4.jpg"]),
        lambda: (root / "b" / "2.jpg").unlink(),
        lambda: (root / "a" / "deep").rename(root / "a" / "deeper"),
        lambda: make(root, ["c/new/5.jpg"]),
    ):
        time.sleep(0.01)  # the modification times of a file system are coarse
        change()
        now = list_files(root, images)
        assert list(now.names) == sorted(str(p.relative_to(root)) for p in root.rglob("*.jpg"))
    assert sum(not above for _, above in walked) == 4


def test_short_listings_and_recently_changed_folders_are_not_cached(
    tmp_path: Path, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    list_files(make(tmp_path / "short", ["1.jpg"]), images)
    monkeypatch.setattr(listing, "_SETTLED", 2 * 10**9)
    list_files(make(tmp_path / "new", ["1.jpg", "2.jpg", "3.jpg"]), images)
    assert not memory.exists()


def test_a_corrupt_cached_listing_is_replaced(tmp_path: Path, memory: Path) -> None:
    root = make(tmp_path / "data", ["1.jpg", "2.jpg", "3.jpg"])
    list_files(root, images)
    kept = next(memory.iterdir())
    kept.write_bytes(kept.read_bytes()[:100])
    assert len(list_files(root, images).names) == 3
