from __future__ import annotations

import json
import os
import zlib
from pathlib import Path

import pytest

from dinocli.core import checksums
from dinocli.core.checksums import crc_of, crc_of_file, parse, seal, unseal, verified


def test_sealed_data_is_read_back_and_any_change_is_detected() -> None:
    data = {"b": [1, 2.5, None, "ü\udcff"], "a": {"inf": "Infinity"}}
    text = json.dumps(seal(data), indent=2)
    assert unseal(text) == data
    assert unseal(json.dumps(dict(reversed(seal(data).items())))) == data, "the order of keys does not matter"
    assert unseal(json.dumps(data)) == data, "an earlier version wrote no checksum"
    for before, after in (("2.5", "2.6"), ('"a"', '"c"'), ("null", "true")):
        with pytest.raises(ValueError, match="checksum does not match"):
            unseal(text.replace(before, after))


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", "nul", "[" * 100_000, '{"a":' * 100_000, b"\xff\xfe{"])
def test_text_that_is_not_a_json_object_raises_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError):
        unseal(text)
    assert parse("[1]") == [1]


def test_a_file_is_verified_together_with_its_header(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"head" + b"body" * 3_000_000)
    assert crc_of_file(path, 4) == zlib.crc32(b"body" * 3_000_000)
    known = f"{crc_of({'x': 1}, crc_of_file(path, 4)):08x}"
    assert verified(path, known, 4, {"x": 1})
    assert not verified(path, known, 4, {"x": 2})
    assert not verified(path, known, 3, {"x": 1})
    assert verified(path, f"{crc_of_file(path):08x}")


@pytest.mark.skipif(not hasattr(os, "setxattr"), reason="needs extended attributes")
def test_a_large_file_is_read_again_only_after_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"large")
    try:
        os.setxattr(path, "user.dinocli.test", b"1")
    except OSError:
        pytest.skip("this file system has no extended attributes")
    known, read = f"{crc_of_file(path):08x}", []
    count = checksums.crc_of_file
    monkeypatch.setattr(checksums, "_LARGE", 5)
    monkeypatch.setattr(checksums, "crc_of_file", lambda *a: read.append(1) or count(*a))
    assert verified(path, known)
    assert verified(path, known)
    assert len(read) == 1
    path.write_bytes(b"latge")
    assert not verified(path, known)
    assert len(read) == 2
