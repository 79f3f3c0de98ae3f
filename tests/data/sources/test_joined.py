from __future__ import annotations

from pathlib import Path

import pytest
from conftest import write_images

from dinocli.data.sources.joined import join_images
from dinocli.data.sources.open import open_images


@pytest.fixture
def parts(tmp_path: Path):
    for seed, (folder, count) in enumerate({"one/cat": 1, "one/dog": 1, "two/ant": 1, "two/cat": 2}.items()):
        write_images(tmp_path / folder, count, seed=seed)
    return [open_images(str(tmp_path / name)) for name in ("one", "two")]


def test_images_and_classes_of_several_sources(parts, tmp_path: Path) -> None:
    joined = join_images("one two", parts)
    assert [joined.read(i) for i in range(5)] == [part.read(i) for part in parts for i in range(len(part))]
    assert joined.classes == ["ant", "cat", "dog"]
    assert joined.labels.tolist() == [1, 2, 0, 1, 1]
    assert (joined.root / joined.names[4]).read_bytes() == joined.read(4)
    assert joined.in_files
    assert (joined.mixture, joined.peers(3)) == ([], range(5))


def test_shares(parts) -> None:
    joined = join_images("one:3 two:1", parts, [3, 1])
    assert joined.mixture == [(range(2), 0.75), (range(2, 5), 0.25)]
    assert [joined.peers(i) for i in (1, 2)] == [range(2), range(2, 5)]
    assert "0.75 of each epoch from 2 images" in joined.notes[0]
    others = [join_images("x", parts), join_images("x", parts, [1, 1]), join_images("x", parts[::-1], [3, 1])]
    assert len({joined.fingerprint, *(other.fingerprint for other in others)}) == 4
    assert joined.fingerprint == join_images("y", parts, [0.6, 0.2]).fingerprint


def test_a_source_without_classes_leaves_all_without(parts, tmp_path: Path) -> None:
    flat = open_images(str(write_images(tmp_path / "flat", 1)))
    assert join_images("x", [parts[0], flat]).labels.tolist() == [-1] * 3
