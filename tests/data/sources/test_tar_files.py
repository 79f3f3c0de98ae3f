from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path

import pytest
from conftest import write_images

from dinocli.data.images import ImagesConfig
from dinocli.data.sources.open import open_source, splits
from dinocli.data.sources.regular import Refused
from dinocli.data.sources.shards import Shards
from dinocli.data.sources.tar_files import TarImages


def tarred(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def test_an_archive_is_read_as_the_folder_that_it_holds(tmp_path: Path) -> None:
    for seed, name in enumerate(("cat", "dog")):
        write_images(tmp_path / "photos" / name, 2, seed=seed)
    subprocess.run(["tar", "cf", "p.tar", "photos"], cwd=tmp_path, check=True)
    source, folder = open_source(str(tmp_path / "p.tar")), open_source(str(tmp_path / "photos"))
    assert isinstance(source, TarImages)
    assert (list(source.names), source.classes) == (list(folder.names), ["cat", "dog"])
    assert source.labels.tolist() == [0, 0, 1, 1]
    assert [source.read(i) for i in (3, 0, 2, 1)] == [folder.read(i) for i in (3, 0, 2, 1)]


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["a/1.jpg", "b/2.jpg"], TarImages),
        (["1.jpg", "2.jpg"], TarImages),
        (["a/1.jpg", "a/info.json"], TarImages),
        (["1.jpg", "1.cls"], Shards),
        (["a/1.jpg", "a/1.json"], Shards),
    ],
)
def test_a_tar_with_labels_is_a_shard(tmp_path: Path, names: list[str], kind: type) -> None:
    path = tarred(tmp_path / "p.tar", {name: b"7" for name in names})
    assert type(open_source(str(path))) is kind


@pytest.mark.parametrize("name", ["p-000.tar", "p-000123.tar", "00.tar", "p*.tar", "{0..1}.tar", "."])
def test_numbered_or_several_tars_are_shards(tmp_path: Path, name: str) -> None:
    for file in ("p.tar", "p-000.tar", "p-000123.tar", "00.tar", "0.tar", "1.tar"):
        tarred(tmp_path / file, {"a/1.jpg": b"7"})
    assert type(open_source(str(tmp_path / name))) is Shards
    assert type(open_source(str(tmp_path / "1.tar"))) is TarImages


def test_splits_of_an_archive(tmp_path: Path) -> None:
    found = splits(str(tarred(tmp_path / "p.tar", {"train/a/1.jpg": b"1", "train/b/1.jpg": b"2", "val/a/1.jpg": b"3"})))
    assert {name: part.classes for name, part in found.items()} == {"train": ["a", "b"], "val": ["a"]}
    assert found["val"].read(0) == b"3"


def test_sparse_members_and_links(tmp_path: Path) -> None:
    with (tmp_path / "a.bmp").open("wb") as file:
        file.truncate(200_000)
        file.seek(100_000)
        file.write(b"x" * 5000)
    (tmp_path / "b.bmp").symlink_to("a.bmp")
    subprocess.run(["tar", "-S", "-cf", "p.tar", "a.bmp", "b.bmp"], cwd=tmp_path, check=True)
    source = open_source(str(tmp_path / "p.tar"))
    assert (tmp_path / "p.tar").stat().st_size < 50_000
    assert [source.read(i) for i in range(2)] == [(tmp_path / "a.bmp").read_bytes()] * 2
    with pytest.raises(Refused, match="too large"):
        source.read(0, ImagesConfig(max_megabytes=0.1))


def test_damage_is_named(tmp_path: Path) -> None:
    path = tarred(tmp_path / "p.tar", {f"{i}.jpg": bytes([i]) * 1000 for i in range(4)})
    whole = open_source(str(path))
    path.write_bytes(path.read_bytes()[:4000])  # three headers, two complete members
    cut = open_source(str(path))
    assert (len(cut), cut.notes) == (
        2,
        (f"{path} is truncated or not a tar file after its first 2 images; the rest is not read",),
    )
    with pytest.raises(Refused, match=r"truncated: .* ends \d+ bytes early"):
        whole.read(3)
    path.write_bytes(path.read_bytes()[: 2 * 1536])  # cut between two members
    between = open_source(str(path))
    assert (len(between), between.notes) == (
        2,
        (f"{path} is without the zeros that end a tar file: images may be missing",),
    )
