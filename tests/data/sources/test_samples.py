from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from dinocli.data.sources.samples import classes_of, label_of
from dinocli.data.sources.shards import UNNUMBERED, Shards, open_shards


def tar(path: Path, *files: tuple[str, bytes]) -> Shards:
    with tarfile.open(path, "w") as opened:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            opened.addfile(member, io.BytesIO(data))
    return open_shards(str(path))


def read(shards: Shards) -> list[tuple[str, bytes, int]]:
    return [(sample.name.partition("/")[2], sample.data, sample.label) for sample in shards.stream(0, 1)]


@pytest.mark.parametrize(
    ("text", "label"),
    [
        (b"7", 7), (b"007\r\n", 7), (b"cat\n", "cat"), (b'"cat"', "cat"), (b"3.0", 3), (b"\xef\xbb\xbf5", 5),
        (b'{"label": 4}', 4), (b'{"cls": "cat"}', "cat"), (b'{"label": "12"}', 12), (b"Lynx lynx", "Lynx lynx"),
        (b"-1", None), (b"", None), (b"{torn", None), (b"\xff\xfe", None), (b"true", None), (b"a\nb", None), (b"[1]", None),
        (b'{"caption": "a cat"}', None), (b"w" * 300, None), (b"9" * 5000, None), (b"[" * 5000, None),
    ],
)  # fmt: skip
def test_labels(text: bytes, label: int | str | None) -> None:
    assert label_of(text) == label


def test_classes_agree_between_splits() -> None:
    assert classes_of({0, 3}) == (["0", "1", "2", "3"], False)
    assert classes_of({"dog", "cat"}) == (["cat", "dog"], True)
    assert classes_of({"dog", 3}) == (["3", "dog"], True)
    assert classes_of({5, 10**12}) == (["5", str(10**12)], True)
    assert classes_of(set()) == ([], False)


def test_text_labels_are_classes_and_numbers_through_a_pipe(tmp_path: Path) -> None:
    words = [
        ("a.png", b"1"),
        ("a.cls", b"dog\n"),
        ("b.png", b"2"),
        ("b.cls", b"cat"),
        ("b.txt", b"a cat"),
        ("c.png", b"3"),
    ]
    shards = tar(tmp_path / "x.tar", *words)
    assert shards.classes == ["cat", "dog"]
    assert [label for *_, label in read(shards)] == [1, 0, -1]
    assert "1 of 3 images" in shards.notes[0]
    piped = open_shards(f"pipe:cat {tmp_path}/x.tar")
    assert [label for *_, label in read(piped)] == [UNNUMBERED, UNNUMBERED, -1]
    large = tar(
        tmp_path / "y.tar", ("a.png", b"1"), ("a.json", b'{"label": 5}'), ("b.png", b"2"), ("b.json", b" " * 2**21)
    )
    assert [label for *_, label in read(large)] == [5, -1]


def test_images_that_share_a_key_are_read_separately(tmp_path: Path) -> None:
    dates = [(f"2021.05.{day:02}.{end}", b"%d" % day) for day in range(40) for end in ("png", "cls")]
    shards = tar(tmp_path / "x.tar", *dates)
    assert read(shards) == [(f"2021.05.{day:02}.png", b"%d" % day, day) for day in range(40)]
    assert shards.counts == [40] and "40 images share" in shards.notes[0]
    assert read(open_shards(f"pipe:cat {tmp_path}/x.tar")) == read(shards)
    shards = tar(
        tmp_path / "y.tar", ("St. Bernard.png", b"1"), ("St. Moritz.png", b"2"), ("a.png", b"3"), ("a.png", b"4")
    )
    assert [data for _, data, _ in read(shards)] == [b"1", b"2", b"3", b"4"]


def test_ignored_parts_of_a_sample_are_reported(tmp_path: Path) -> None:
    shards = tar(
        tmp_path / "x.tar",
        ("a.jpg", b"1"),
        ("a.mask.png", b"m"),
        ("a.png", b"m"),
        ("b.v2.jpg", b"2"),
        ("b.v2.mask.png", b"m"),
    )
    assert [name for name, *_ in read(shards)] == ["a.jpg", "b.v2.jpg"]
    assert shards.notes[0].startswith("3 images belong to another image's sample")


def test_hidden_members_and_macos_resource_forks_are_ignored(tmp_path: Path) -> None:
    hidden = [
        "._a.png",
        "set/._a.png",
        "./set/._a.png",
        "__MACOSX/set/b.png",
        "set/.thumbs/c.png",
        "__meta__/d.png",
        "set/@eaDir/e.png",
    ]
    shards = tar(tmp_path / "x.tar", *[(name, b"x") for name in hidden], ("./set/a.png", b"1"), ("x/../y.png", b"2"))
    assert read(shards) == [("set/a.png", b"1", -1), ("x/../y.png", b"2", -1)]
    assert not shards.notes


def test_labels_apart_from_their_images_are_found(tmp_path: Path) -> None:
    names = ["a", "b.2", "c"]
    shards = tar(
        tmp_path / "x.tar",
        *[(f"{n}.png", n.encode()) for n in names],
        *[(f"{n}.cls", b"%d" % i) for i, n in enumerate(names)],
    )
    assert read(shards) == [("a.png", b"a", 0), ("b.2.png", b"b.2", 1), ("c.png", b"c", 2)]
    assert (shards.classes, shards.notes) == (["0", "1", "2"], ())
    lost = tar(tmp_path / "y.tar", ("a.png", b"1"), ("b.cls", b"3"), ("info.json", b"{}"))
    assert lost.notes == ("1 labels belong to no image and are ignored, such as b.cls",)


def test_members_of_other_kinds_are_counted(tmp_path: Path) -> None:
    shards = tar(
        tmp_path / "x.tar", ("a.png", b"1"), ("a.txt", b"x"), ("b.psd", b"x"), ("c.mp4", b"x"), ("d.psd", b"x")
    )
    assert shards.notes == (
        "not read in the shards: 2 .psd, 1 .mp4",
        "1 .txt members are taken for captions and are ignored; labels are .cls and .json members",
    )
    labelled = tar(tmp_path / "y.tar", ("a.png", b"1"), ("a.cls", b"0"), ("a.txt", b"x"))
    assert not labelled.notes


def test_a_large_member_is_not_read_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    shards = tar(tmp_path / "x.tar", ("a.png", b"x" * 3_000_000), ("b.png", file.getvalue()))
    for source in (shards, open_shards(f"pipe:cat {tmp_path}/x.tar")):
        first, second = source.stream(0, 1, max_megabytes=2)
        assert (first.data, first.reason) == (b"", "too large: 3 megabytes, over 2")
        assert (second.data, second.reason) == (file.getvalue(), "")
