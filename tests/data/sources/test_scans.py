from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from dinocli.data.sources import scans
from dinocli.data.sources.scans import scan


def test_json_is_skipped_after_many_members_without_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for i in range(30):
            for name, data in ((f"{i}.jpg", b"x"), (f"{i}.json", b'{"caption": "a cat"}')):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    looked = []
    real = scans.read_label
    monkeypatch.setattr(scans, "_TRIES", 7)
    monkeypatch.setattr(scans, "read_label", lambda content, opened: looked.append(content) or real(content, opened))
    found = scan(str(tmp_path / "x.tar"))
    assert (found.images, found.unlabelled, found.labels, found.torn) == (30, 30, frozenset(), "")
    assert len(looked) == 7
