from __future__ import annotations

import io
import itertools
import json
import os
import pickle
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from dinocli.core.checksums import seal
from dinocli.core.errors import DinoError
from dinocli.data.sources import open as sources
from dinocli.data.sources import samples, shards, tar
from dinocli.data.sources.shards import SUFFIXES, Sample, is_shards, open_shards


def write_tar(path: Path, files: Iterable[tuple[str, bytes]], form: int = tarfile.GNU_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_shards(folder: Path, counts: Iterable[int]) -> Path:
    """Write shards whose images contain their own name, labelled by their index in the shard."""
    for s, count in enumerate(counts):
        pairs = [[(f"{s}/{i:04}.jpg", f"{s}/{i:04}".encode()), (f"{s}/{i:04}.cls", b"%d" % i)] for i in range(count)]
        write_tar(folder / f"train-{s:03}.tar", itertools.chain.from_iterable(pairs))
    return folder


def names(samples: Iterable[Sample]) -> list[str]:
    return [sample.name for sample in samples]


def taken(samples: Iterable[Sample], count: int) -> list[Sample]:
    return list(itertools.islice(samples, count))


def test_samples_keep_their_order_without_a_seed(tmp_path: Path) -> None:
    found = open_shards(str(write_shards(tmp_path, [2, 3])))
    samples = list(found.stream(0, 1))
    assert (found.counts, found.count, found.classes) == ([2, 3], 5, ["0", "1", "2"])
    assert samples[0] == Sample(0, 0, "train-000.tar/0/0000.jpg", b"0/0000", 0)
    assert samples[4] == Sample(0, 2**32 + 2, "train-001.tar/1/0002.jpg", b"1/0002", 2)
    assert pickle.loads(pickle.dumps(found)) == found


@pytest.mark.parametrize("counts", [[7, 5, 1, 6, 0, 4, 8], [9, 4], [30]])
@pytest.mark.parametrize("lanes", [1, 2, 3, 5])
def test_workers_share_each_epoch_and_a_resume_continues(tmp_path: Path, counts: list[int], lanes: int) -> None:
    found = open_shards(str(write_shards(tmp_path, counts)))
    passed = [sample for lane in range(lanes) for sample in found.stream(lane, lanes)]
    assert sorted(sample.number for sample in passed) == [s * 2**32 + i for s, n in enumerate(counts) for i in range(n)]
    epochs = []
    for lane in range(lanes):
        whole = taken(found.stream(lane, lanes, seed=3, buffer=4), 60)
        for skip in (1, 5, 17, 40):
            assert taken(found.stream(lane, lanes, seed=3, buffer=4, skip=skip), 60 - skip) == whole[skip:]
        order = shards.np.random.default_rng((3, 0)).permutation(len(counts)).tolist()
        epochs += whole[: found._length(order, lane, lanes)]
    assert sorted(sample.number for sample in epochs) == sorted(sample.number for sample in passed)


def test_order_depends_on_seed_and_epoch(tmp_path: Path) -> None:
    found = open_shards(str(write_shards(tmp_path, [20, 20])))
    both = names(taken(found.stream(0, 1, seed=0), 80))
    assert sorted(both[:40]) == sorted(both[40:]) and both[:40] != both[40:]
    assert names(taken(found.stream(0, 1, seed=0), 80)) == both
    assert names(taken(found.stream(0, 1, seed=1), 40)) != both[:40]


def test_skipping_reads_no_content_and_for_whole_epochs_no_headers(tmp_path: Path, monkeypatch) -> None:
    found = open_shards(str(write_shards(tmp_path, [10])))
    expected = taken(found.stream(0, 1, seed=0), 40)[35:]
    headers, contents = [], []
    take = tar.LocalTar.take
    monkeypatch.setattr(tar.LocalTar, "take", lambda tape, size: headers.append(size) or take(tape, size))
    for name in ("read", "read_label"):
        real = getattr(shards, name)
        count = lambda content, opened, real=real: contents.append(content) or real(content, opened)  # noqa: E731
        monkeypatch.setattr(shards, name, count)
    assert taken(found.stream(0, 1, seed=0, skip=35), 5) == expected
    assert (len(headers), len(contents)) == (21, 10)  # one epoch's headers and its end; five images, five labels


def test_keys_and_labels_follow_webdataset(tmp_path: Path) -> None:
    files = [
        ("./a.b/one.JPG", b"1"), ("./a.b/one.cls", b"7\n"),  # a dot in the folder does not end the key; case is ignored
        ("two.seg.png", b"mask"), ("two.png", b"2"), ("two.json", b'{"label": 3, "x": 1}'), ("two.txt", b"words"),
        ("three.json", b'{"cls": 4}'), ("three.webp", b"3"),
        ("four.v2.jpg", b"4"), ("four.cls", b"007"),
        ("five.cls", b"5"),  # no image
        (".masked_logits.jpg", b"x"), ("folder/.DS_Store", b"x"), ("plain", b"x"), ("__meta__/x.jpg", b"x"),
        ("six.jpg", b"6"), ("six.cls", b"n01440764"), ("seven.jpg", b"7"), ("seven.json", b"[1"),
        ("eight.tiff", b"8"), ("eight.json", b'{"label": true}'),
    ]  # fmt: skip
    write_tar(tmp_path / "x.tar", files)
    found = open_shards(str(tmp_path / "x.tar"))
    assert found.classes == ["3", "4", "7", "n01440764"]
    samples = list(found.stream(0, 1))
    assert [(s.name, s.data, s.label) for s in samples] == [
        ("x.tar/a.b/one.JPG", b"1", 2),
        ("x.tar/two.png", b"2", 0),
        ("x.tar/three.webp", b"3", 1),
        ("x.tar/four.v2.jpg", b"4", 2),
        ("x.tar/six.jpg", b"6", 3),
        ("x.tar/seven.jpg", b"7", -1),
        ("x.tar/eight.tiff", b"8", -1),
    ]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_non_ascii_names_in_every_format(tmp_path: Path, form: int) -> None:
    wanted = ["klein/übung 花.jpg", "f" * 90 + "/" + "n" * 60 + ".png"]
    wanted += [] if form == tarfile.USTAR_FORMAT else ["d/" * 100 + "ü" * 120 + ".jpg"]
    write_tar(tmp_path / "x.tar", [(name, b"z" * 1000) for name in wanted], form)
    with tarfile.open(tmp_path / "x.tar", "a", format=form) as tar:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE):
            member = tarfile.TarInfo("z.jpg")
            member.type, member.linkname = kind, "l" * (20 if form == tarfile.USTAR_FORMAT else 200)
            tar.addfile(member)
        tar.addfile(tarfile.TarInfo("last.jpg"))
    samples = list(open_shards(str(tmp_path / "x.tar")).stream(0, 1))
    assert names(samples) == [f"x.tar/{name}" for name in [*wanted, "last.jpg"]]
    assert all(sample.data == b"z" * 1000 for sample in samples[:-1])


def test_sizes_in_pax_records_and_in_binary(tmp_path: Path) -> None:
    data = b"y" * 700
    member = tarfile.TarInfo("a.jpg")
    member.size = len(data)
    member.pax_headers = {"size": "700", "comment": "x"}
    plain = member.tobuf(tarfile.PAX_FORMAT)
    header = bytearray(tarfile.TarInfo("b.jpg").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\x80" + len(data).to_bytes(11)
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 256 + sum(header[156:512]))
    (tmp_path / "x.tar").write_bytes(b"".join([plain, data.ljust(1024, b"\0"), header, data.ljust(1024, b"\0")]))
    assert [s.data for s in open_shards(str(tmp_path / "x.tar")).stream(0, 1)] == [data, data]


@pytest.mark.parametrize("cut", [700, 2048 + 100, 2048 + 700])
def test_a_truncated_shard_gives_its_complete_members_and_is_named(tmp_path: Path, cut: int) -> None:
    write_shards(tmp_path, [3, 2])
    torn = tmp_path / "train-000.tar"
    torn.write_bytes(torn.read_bytes()[:cut])
    found = open_shards(str(tmp_path))
    samples = list(found.stream(0, 1))
    whole = cut // 2048
    assert found.counts == [whole + 1, 2] and len(samples) == found.count
    assert samples[whole] == Sample(0, whole, "train-000.tar", b"", -1)
    assert [s.name for s in samples if s.data and s.number < 2**32] == ["train-000.tar/0/0000.jpg"] * whole
    assert samples[-1].data == b"1/0001"


def test_a_shard_that_is_cut_between_members_is_named(tmp_path: Path) -> None:
    """Readers of tar take it for a shorter one."""
    write_shards(tmp_path, [3, 2])
    cut = tmp_path / "train-000.tar"
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert open_shards(str(tmp_path)).notes == ()
    cut.write_bytes(cut.read_bytes()[: 2 * 2048])  # two images of three, with their labels
    with tarfile.open(cut) as file:
        assert len(file.getnames()) == 4
    found = open_shards(str(tmp_path))
    assert found.counts == [2, 2]
    assert found.notes == (f"1 shards without the zeros that end a tar file, such as {cut}: images may be missing",)
    whole = (tmp_path / "train-001.tar").read_bytes()
    appended = write_tar(tmp_path / "more" / "a.tar", [("a.jpg", b"a")])
    for kept, notes in ((appended.stat().st_size, 0), (1024, 1)):  # all of the second archive, or its member alone
        (tmp_path / "more" / "b.tar").write_bytes(whole + appended.read_bytes()[:kept])
        assert len(open_shards(str(tmp_path / "more" / "b.tar")).notes) == 1 + notes  # one image of three has no label
    index = {"classes": [], "shards": {"train-000.tar": 3, "train-001.tar": 2}, "bytes": sizes}
    (tmp_path / "index.json").write_text(json.dumps(index))
    differs = "1 shards differ in size from index.json, such as"
    size = f"of 4096 bytes; expected {sizes[cut.name]}: images may be missing"
    assert open_shards(str(tmp_path)).notes == (f"{differs} {cut} {size}", *found.notes)


def test_corrupt_and_deleted_shards_end_early_and_are_named(tmp_path: Path) -> None:
    write_shards(tmp_path, [3, 1, 1])
    data = bytearray((tmp_path / "train-000.tar").read_bytes())
    data[2048 + 5] ^= 255  # in the second image's name
    (tmp_path / "train-000.tar").write_bytes(data)
    (tmp_path / "train-002.tar").write_bytes(b"")
    found = open_shards(str(tmp_path))
    (tmp_path / "train-001.tar").unlink()
    assert [(s.name, s.data) for s in found.stream(0, 1)] == [
        ("train-000.tar/0/0000.jpg", b"0/0000"),
        ("train-000.tar", b""),
        ("train-001.tar", b""),
        ("train-002.tar", b""),
    ]
    assert len(taken(found.stream(0, 1, seed=0), 20)) == 20


def test_content_truncated_after_its_header_was_read_is_empty(tmp_path: Path) -> None:
    found = open_shards(str(write_shards(tmp_path, [5])))
    stream = found.stream(0, 1, seed=0, buffer=3)
    next(stream)
    os.truncate(tmp_path / "train-000.tar", 600)
    assert not all(sample.data for sample in taken(stream, 2))


def test_valid_specifications_of_shards(tmp_path: Path, monkeypatch) -> None:
    write_shards(tmp_path / "s", [1] * 12)
    write_tar(tmp_path / "s" / "odd[1].tar", [("a.jpg", b"1")])
    monkeypatch.chdir(tmp_path)
    three = ["s/train-008.tar", "s/train-009.tar", "s/train-010.tar"]
    assert open_shards("s/train-{008..010}.tar").urls == three
    assert open_shards("s/train-0{10..08}.tar").urls == three[::-1]
    assert open_shards("s/train-00[89].tar").urls == three[:2]
    assert open_shards("s/train-{00..01}1.t*r").urls == ["s/train-001.tar", "s/train-011.tar"]
    assert open_shards("s/odd[1].tar").urls == ["s/odd[1].tar"]
    assert len(open_shards("s").urls) == 13
    assert list(shards._ranges("pipe:x {1..2}-{09..10} '{print $1}'"))[1:3] == [
        "pipe:x 1-10 '{print $1}'",
        "pipe:x 2-09 '{print $1}'",
    ]


def test_shards_are_recognized(tmp_path: Path) -> None:
    for spec in ("x.tar", "a/{0..9}.tar", "*.tar", "pipe:cat x", "x.tgz"):
        assert is_shards(spec)
    write_shards(tmp_path / "s", [1])
    (tmp_path / "s" / "index.json").write_text("{}")
    assert is_shards(str(tmp_path / "s"))
    (tmp_path / "s" / "a.png").touch()
    (tmp_path / "t").mkdir()
    for spec in ("images", "list.txt", "torchvision:CIFAR10", str(tmp_path / "s"), str(tmp_path), str(tmp_path / "t")):
        assert not is_shards(spec)
    assert sources.SUFFIXES <= SUFFIXES


def test_missing_shards_are_an_error(tmp_path: Path) -> None:
    write_shards(tmp_path, [1, 0])
    (tmp_path / "zip.tar").write_bytes(b"PK" * 1000)
    for spec, message in [
        ("train-{000..009}.tar", "train-002.tar does not exist"),
        ("none-*.tar", "no file matches"),
        ("train-001.tar", "no images"),
        ("zip.tar", "no images .* is truncated or not a tar file"),
        ("train.tar.gz", "compressed"),
        ("deep/**/none.tar", "no file matches"),
    ]:
        with pytest.raises(DinoError, match=message) as error:
            open_shards(str(tmp_path / spec))
        assert error.value.hint
    with pytest.raises(DinoError, match="too few images"):
        next(open_shards(str(tmp_path)).stream(3, 4, seed=0))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("a/x-{0..9}.tar.gz", "'pipe:gzip -dc a/x-{0..9}.tar.gz'"),
        ("x*.TGZ", "'pipe:gzip -dc x*.TGZ'"),
        ("x.tar.zst", "'pipe:zstd -dc x.tar.zst'"),
        ("x.tar.xz", "'pipe:xz -dc x.tar.xz'"),
        ("my set.tar.bz2", "'pipe:bzip2 -dc my\\ set.tar.bz2'"),
    ],
)
def test_compressed_shards_get_the_command_that_decompresses_them(name: str, hint: str) -> None:
    with pytest.raises(DinoError, match="is compressed") as error:
        open_shards(name)
    assert error.value.hint == f"use {hint}, or unpack them"


def test_two_stars_match_folders_of_any_depth(tmp_path: Path) -> None:
    for folder in ("", "a", "a/b"):
        write_shards(tmp_path / "s" / folder, [1])
    assert open_shards(str(tmp_path / "s" / "**" / "*.tar")).count == 3


def test_an_index_gives_the_counts_of_shards_whose_sizes_match(tmp_path: Path, monkeypatch) -> None:
    write_shards(tmp_path, [2, 3])
    sizes = {p.name: p.stat().st_size for p in tmp_path.iterdir()}
    index = {"classes": ["cat", "dog"], "shards": dict.fromkeys(sizes, 50), "bytes": sizes}
    (tmp_path / "index.json").write_text(json.dumps(index))
    assert open_shards(str(tmp_path)).counts == [50, 50]
    assert open_shards(str(tmp_path / "train-001.tar")).classes == ["cat", "dog"]
    index["bytes"]["train-001.tar"] += 1
    (tmp_path / "index.json").write_text(json.dumps(index))
    assert open_shards(str(tmp_path)).counts == [50, 3]
    (tmp_path / "index.json").write_text("[")
    assert open_shards(str(tmp_path)).counts == [2, 3]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda index: {**seal(index), "shards": {"train-000.tar": 3, "train-001.tar": 3}}, "checksum does not match"),
        (lambda index: {**index, "shards": {"../train-000.tar": 2}}, "which is not in this folder"),
        (lambda index: {**index, "bytes": {"/train-000.tar": 2}}, "which is not in this folder"),
        (lambda index: {**index, "shards": {"train-000.tar": -2}}, "the count of train-000.tar is -2"),
        (lambda index: {**index, "shards": {"train-000.tar": "2"}}, "the count of train-000.tar is '2'"),
        (lambda index: {**index, "shards": [2, 3]}, "it does not state the images and bytes"),
        (lambda index: None, "it is nested too deeply"),
    ],
)
def test_the_error_for_a_corrupt_index_is_one_line(
    tmp_path: Path, change: Callable[[dict[str, object]], dict[str, object] | None], said: str
) -> None:
    write_shards(tmp_path, [2, 3])
    sizes = {p.name: p.stat().st_size for p in tmp_path.iterdir()}
    text = json.dumps(change({"classes": ["cat"], "shards": {"train-000.tar": 2, "train-001.tar": 3}, "bytes": sizes}))
    (tmp_path / "index.json").write_text('{"shards": ' * 100_000 if text == "null" else text)
    with pytest.raises(DinoError, match=said) as error:
        open_shards(str(tmp_path))
    assert "\n" not in error.value.message


def test_an_index_of_another_tool_is_ignored(tmp_path: Path) -> None:
    write_shards(tmp_path, [2, 3])
    for text in ('{"a": 1}\n{"b": 2}\n', "{}", "[]", '{"shards": 3}'):
        (tmp_path / "index.json").write_text(text)
        assert open_shards(str(tmp_path)).counts == [2, 3]


def test_pipes_give_the_same_samples_as_files(tmp_path: Path) -> None:
    write_shards(tmp_path, [3, 2])
    local = open_shards(str(tmp_path))
    piped = open_shards(f"pipe:cat {tmp_path}/train-{{000..001}}.tar | cat")
    assert (piped.counts, piped.count) == (None, None)
    assert list(piped.stream(0, 1)) == list(local.stream(0, 1))
    for lane, lanes in ((0, 1), (1, 2), (2, 3)):
        whole = taken(local.stream(lane, lanes, seed=5, buffer=3), 12)
        assert taken(piped.stream(lane, lanes, seed=5, buffer=3, skip=7), 5) == whole[7:]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("cat {0}/train-000.tar; exit 3", "exit code 3"),
        ("cat {0}/train-000.tar; false | cat", "exit code 1"),
        ("head -c 3000 {0}/train-000.tar", "truncated.*exit code 0"),
        ("head -c 2600 {0}/train-000.tar; exit 9", "truncated.*exit code 9"),
        ("true", "truncated"),
        ("echo this is no tar file", "truncated"),
    ],
)
def test_a_pipe_that_fails_is_named_with_its_code(tmp_path: Path, command: str, message: str) -> None:
    write_shards(tmp_path, [3])
    command = command.format(tmp_path)
    with pytest.raises(DinoError, match=message) as error:
        list(open_shards(f"pipe:{command}").stream(0, 1))
    assert command in error.value.message


def test_an_endless_command_ends_with_its_reader(tmp_path: Path, monkeypatch) -> None:
    write_shards(tmp_path, [3])
    started: list[Any] = []
    monkeypatch.setattr(
        tar.subprocess,
        "Popen",
        lambda *a, start=tar.subprocess.Popen, **k: started.append(start(*a, **k)) or started[-1],
    )
    stream = open_shards(f"pipe:cat {tmp_path}/train-000.tar; sleep 60; true").stream(0, 1)
    assert next(stream).label == 0
    stream.close()
    assert started[0].returncode == -15


def test_no_file_stays_open(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(samples, "_OPEN", 3)
    found = open_shards(str(write_shards(tmp_path, [2] * 20)))
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    stream = found.stream(0, 1, seed=0, buffer=40)
    assert all(sample.data for sample in taken(stream, 80))
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before + 4
        stream.close()
        assert len(os.listdir("/proc/self/fd")) == before


def test_an_array_is_an_image_if_its_key_has_no_other(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [("a.npy", b"1"), ("a.cls", b"2"), ("b.npy", b"feature"), ("b.png", b"3")])
    samples = list(open_shards(str(tmp_path / "x.tar")).stream(0, 1))
    assert [(s.name, s.data, s.label) for s in samples] == [("x.tar/a.npy", b"1", 2), ("x.tar/b.png", b"3", -1)]
