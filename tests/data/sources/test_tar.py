from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from dinocli.core.errors import DinoError
from dinocli.data.sources import shards
from dinocli.data.sources.shards import open_shards
from dinocli.data.sources.tar import LocalTar, PipedTar, Span, members

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
def test_both_readers_agree_with_tarfile(tmp_path: Path, form: int) -> None:
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
def test_a_truncated_tar_ends_early_and_is_reported(tmp_path: Path, cut: int) -> None:
    path = written(tmp_path / "a.tar", tarfile.GNU_FORMAT)
    path.write_bytes(path.read_bytes()[: cut if cut > 0 else -9000 + cut])
    tape = LocalTar(str(path))
    assert len(list(members(tape))) < len(NAMES) + 1
    assert tape.torn == "is truncated or not a tar file"
    tape.close()


def test_a_command_that_fails_is_named() -> None:
    tape = PipedTar("pipe:false")
    list(members(tape))
    with pytest.raises(DinoError, match=r"`false`: .*exit code 1"):
        tape.finish()
    tape.close()


def read(spec: str) -> list[tuple[str, bytes, str]]:
    return [(s.name.partition("/")[2], s.data, s.reason) for s in open_shards(spec).stream(0, 1)]


def test_links_have_the_content_of_their_target(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    links = [
        ("a/2.png", tarfile.LNKTYPE, "./a/1.png"), ("a/3.png", tarfile.SYMTYPE, "2.png"), ("b/4.png", tarfile.SYMTYPE, "../a/1.png"),
        ("5.png", tarfile.SYMTYPE, "6.png"), ("a/1.png", tarfile.LNKTYPE, "a/1.png"), ("7.png", tarfile.LNKTYPE, "gone.png"),
        ("8.png", tarfile.SYMTYPE, "9.png"), ("9.png", tarfile.SYMTYPE, "8.png"), ("l.png", tarfile.SYMTYPE, "l" * 150 + ".png"),
    ]  # fmt: skip
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name in ("a/1.png", "6.png", "l" * 150 + ".png"):
            member = tarfile.TarInfo(name)
            member.size = 3
            tar.addfile(member, io.BytesIO(name.encode()[:3]))
        for name, kind, target in links:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            tar.addfile(member)
    found = {name: data for name, data, _ in read(str(path))}
    assert {name: found[name] for name in ("a/1.png", "a/2.png", "a/3.png", "b/4.png")} == dict.fromkeys(
        ("a/1.png", "a/2.png", "a/3.png", "b/4.png"), b"a/1"
    )
    assert (found["5.png"], found["l.png"], len(found)) == (b"6.p", b"lll", 8)
    [note] = open_shards(str(path)).notes
    assert note.startswith("3 images are links to files outside their shard")
    # A pipe cannot return to earlier members, so links to them are skipped with a reason.
    reasons = {name: reason for name, _, reason in read(f"pipe:cat {path}") if reason}
    assert len(reasons) == 8 and reasons["a/2.png"].startswith("hard link: ")


@pytest.mark.parametrize("blocks", [1, 2, 20])
def test_an_appended_archive_is_read(tmp_path: Path, blocks: int) -> None:
    whole = b""
    for half in (0, 1):
        with tarfile.open(tmp_path / "half.tar", "w") as tar:
            for i in (2 * half, 2 * half + 1):
                member = tarfile.TarInfo(f"{i}.png")
                member.size = 1
                tar.addfile(member, io.BytesIO(b"%d" % i))
        whole += (tmp_path / "half.tar").read_bytes()[: 4 * 512] + bytes(512 * blocks)
    (tmp_path / "x.tar").write_bytes(whole)
    expected = [(f"{i}.png", b"%d" % i, "") for i in range(4)]
    assert read(str(tmp_path / "x.tar")) == read(f"pipe:cat {tmp_path}/x.tar") == expected
    (tmp_path / "x.tar").write_bytes(whole + b"other things behind the end" * 100)
    assert read(str(tmp_path / "x.tar")) == expected, "tar ignores them too"
    torn = bytearray(whole)
    torn[4 * 512 + 512 * blocks + 1024] ^= 255  # in a header of the second archive
    (tmp_path / "x.tar").write_bytes(torn)
    assert [name for name, *_ in read(str(tmp_path / "x.tar"))] == ["0.png", "1.png", "2.png", ""]


def octal(number: int) -> bytes:
    return b"%011o\0" % number


def checked(header: bytearray) -> bytes:
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 256 + sum(header[156:512]))
    return bytes(header)


SPARSE = b"\0" * 700 + b"x" * 600 + b"\0" * 5000 + b"yz" + b"\0" * 100
PIECES = [(700, 600), (6300, 2), (len(SPARSE), 0)]


def stored(form: str) -> bytes:
    """Return a sparse file as `tar -S` stores it."""
    data = b"".join(SPARSE[place : place + length] for place, length in PIECES)
    numbers = [number for piece in PIECES for number in piece]
    member = tarfile.TarInfo("GNUSparseFile.1/a.png" if form != "gnu" else "a.png")
    pieces = [("GNU.sparse.offset", "GNU.sparse.numbytes")[i % 2] for i in range(len(numbers))]
    if form == "gnu":
        many = [n for pair in [(0, 0)] * 30 + PIECES for n in pair]  # more than the header and one block hold
        member.size, member.type = len(data), b"S"
        header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
        header[386:482] = b"".join(map(octal, many[:8]))
        header[482:495] = b"\1" + octal(len(SPARSE))
        blocks = [b"".join(map(octal, many[i : i + 42])).ljust(504, b"\0") for i in range(8, len(many), 42)]
        ends = [b"\1"] * (len(blocks) - 1) + [b"\0"]
        more = b"".join((block + end).ljust(512, b"\0") for block, end in zip(blocks, ends, strict=True))
        return checked(header) + more + data.ljust(1024, b"\0")
    records = {"GNU.sparse.name": "a.png", "GNU.sparse.realsize": str(len(SPARSE))}
    if form == "1.0":
        data = b"\n".join(b"%d" % n for n in [len(PIECES), *numbers]).ljust(511, b"\0") + b"\n" + data
        data = data.replace(b"\0" * 10, b"\n" + b"\0" * 9, 1)
        records |= {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
    elif form == "0.1":
        records |= {"GNU.sparse.map": ",".join(map(str, numbers))}
    member.size = len(data)
    lines = [f"{key}={value}\n" for key, value in records.items()]
    if form == "0.0":
        lines = [f"GNU.sparse.size={len(SPARSE)}\n", f"GNU.sparse.numblocks={len(PIECES)}\n"]
        lines += [f"{key}={number}\n" for key, number in zip(pieces, numbers, strict=True)]
        member.name = "a.png"
    text = b"".join(b"%03d %s" % (len(line) + 4, line.encode()) for line in lines)
    before = tarfile.TarInfo("x")
    before.size, before.type = len(text), tarfile.XHDTYPE
    parts = [before.tobuf(tarfile.USTAR_FORMAT), text, member.tobuf(tarfile.USTAR_FORMAT), data]
    return b"".join(part + bytes(-len(part) % 512) for part in parts)


@pytest.mark.parametrize("form", ["gnu", "0.0", "0.1", "1.0"])
def test_sparse_members_are_read_with_their_zeros(tmp_path: Path, form: str) -> None:
    member = tarfile.TarInfo("b.png")
    member.size = 1
    after = member.tobuf(tarfile.GNU_FORMAT) + b"b".ljust(512, b"\0")
    (tmp_path / "x.tar").write_bytes(stored(form) + after + bytes(1024))
    expected = [("a.png", SPARSE, ""), ("b.png", b"b", "")]
    assert read(str(tmp_path / "x.tar")) == read(f"pipe:cat {tmp_path}/x.tar") == expected
    for spec in (str(tmp_path / "x.tar"), f"pipe:cat {tmp_path}/x.tar"):
        samples = list(open_shards(spec).stream(0, 1, max_megabytes=0.005))
        assert samples[0].reason == "too large: 0.0064 megabytes, over 0.005", "the size includes the zeros"
        assert samples[1].data == b"b"
    assert shards.read_sample(open_shards(str(tmp_path / "x.tar")), "x.tar/a.png") == SPARSE


@pytest.mark.parametrize("form", ["gnu", "0.1", "1.0"])
@pytest.mark.parametrize("place", range(0, 2048, 311))
def test_a_damaged_sparse_member_never_raises(tmp_path: Path, form: str, place: int) -> None:
    data = bytearray(stored(form))
    data[place % len(data)] ^= 0x31
    first = bytearray(data[:512])
    (tmp_path / "x.tar").write_bytes((checked(first) if form == "gnu" else bytes(first)) + data[512:] + bytes(1024))
    tape = LocalTar(str(tmp_path / "x.tar"))
    assert len(list(members(tape))) <= 1
    tape.close()
