from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import write_images
from test_tar_files import tarred

from dinocli.core.errors import DinoError
from dinocli.data.decode.extras import Extra
from dinocli.data.images import ImagesConfig
from dinocli.data.sources.indexed import Images
from dinocli.data.sources.open import within
from dinocli.data.sources.outputs import marked
from dinocli.data.sources.several import open_sources, split_weight
from dinocli.data.sources.shards import Shards


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("a", "b", "c-1")):
        write_images(tmp_path / name, 2, seed=seed)
    with zipfile.ZipFile("d.zip", "w") as archive:
        archive.write("a/0000.png")
    return tmp_path


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("a:0.7", ("a", 0.7)),
        ("a:.5", ("a", 0.5)),
        ("a:2", ("a", 2)),
        ("torchvision:CIFAR10:1", ("torchvision:CIFAR10", 1)),
        ("torchvision:CIFAR10", ("torchvision:CIFAR10", None)),
        ("https://host:8080", ("https://host:8080", None)),
        ("https://host:8080/x:2", ("https://host:8080/x", 2)),
        ("x:1", ("x:1", None)),  # a file of this name exists
        ("pipe:aws --endpoint-url http://h:9000", ("pipe:aws --endpoint-url http://h:9000", None)),
    ],
)
def test_weights(here: Path, spec: str, expected: tuple[str, float | None]) -> None:
    Path("x:1").touch()
    assert split_weight(spec) == expected


def test_all_images_of_folders_archives_patterns_and_files(here: Path) -> None:
    source = open_sources(["a", "d.zip", "c-*", "b/0001.png", "a"])
    assert isinstance(source, Images)
    assert list(source.names) == [
        "b/0001.png",
        "a/0000.png",
        "a/0001.png",
        "d.zip/0000.png",
        "c-1/0000.png",
        "c-1/0001.png",
    ]
    assert source.read(3) == Path("a/0000.png").read_bytes()
    assert list(open_sources(["c-*/*.png"]).names) == ["c-1/0000.png", "c-1/0001.png"]


def test_files_of_several_images(here: Path) -> None:
    for name in ("p/x.npz", "p/y.npz", "z.npz"):
        Path(name).parent.mkdir(exist_ok=True)
        np.savez(name, images=np.zeros((2, 8, 8), np.uint8))
    settings = ImagesConfig(key="images")
    single = open_sources(["z.npz"])
    assert list(within(single, settings).names) == ["z.npz#row=0", "z.npz#row=1"]
    rows = [f"p/{name}.npz#row={row}" for name in "xy" for row in (0, 1)]
    assert list(within(open_sources(["p/*.npz", "a"]), settings).names) == [*rows, "a/0000.png", "a/0001.png"]
    assert within(open_sources(["z.npz:1", "a:1"]), settings).mixture == [(range(2), 0.5), (range(2, 4), 0.5)]
    with pytest.raises(DinoError, match=r"no images in z\.npz: it holds 1 \.npz") as error:
        within(single, ImagesConfig())
    assert "--set images.key=NAME" in error.value.hint


def test_arrays_next_to_images_count_only_if_they_are_named(here: Path) -> None:
    np.save("a/mask.npy", np.zeros((8, 8), np.uint8))
    assert list(open_sources(["a/*"]).names) == ["a/0000.png", "a/0001.png"]
    assert list(open_sources(["a/*.npy"]).names) == ["a/mask.npy"]
    assert list(open_sources(["a/0000.png", "a/mask.npy"]).names) == ["a/0000.png", "a/mask.npy"]


def test_the_package_that_reads_a_file_is_named(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Extra, "installed", False)
    Path("v.nii.gz").touch()
    with pytest.raises(DinoError, match=r"v\.nii\.gz needs the package nibabel") as error:
        open_sources(["v.nii.gz"])
    assert error.value.hint == "pip install 'dinocli[medical]'"


def test_a_pattern_ignores_outputs_as_its_folder_does(here: Path) -> None:
    write_images(here / "g" / "cat", 2)
    write_images(here / "g" / "@eaDir", 1)
    for folder, name in (("g/attention", "heads/1.png"), ("g/cat", "sheet.png"), ("g", "search.png")):
        path = Path(folder) / name
        with marked(Path(folder), "attn-map", [path]):
            path.parent.mkdir(exist_ok=True, parents=True)
            path.write_bytes(Path("a/0000.png").read_bytes())
    source = open_sources(["g/*", "a"])
    assert list(source.names) == ["g/cat/0000.png", "g/cat/0001.png", "a/0000.png", "a/0001.png"]
    assert "ignoring g/attention/, g/search.png: written by dino" in source.notes
    source = open_sources(["g/**/*.png"])
    assert list(source.names) == ["g/cat/0000.png", "g/cat/0001.png"]
    assert source.notes == ("ignoring g/attention/, g/cat/sheet.png, g/search.png: written by dino",)
    assert list(open_sources(["g/attention/*/*"]).names) == ["g/attention/heads/1.png"], (
        "the folder that is named is read"
    )
    with pytest.raises(DinoError, match=r"the pattern g/at\* matches only outputs of dino, such as g/attention/"):
        open_sources(["g/at*"])


def test_shares(here: Path) -> None:
    source = open_sources(["a:0.5", "[bc]*:1.5"])
    assert source.mixture == [(range(2), 0.25), (range(2, 6), 0.75)]


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (["a:0.5", "b"], "b has no weight, but other sources have one"),
        (["a:x", "b:0.5"], "the weight 'x' of a is not a number"),
        (["a:0", "b:1"], "a:0 has the weight 0"),
        (["a", "gone"], "gone does not exist"),
        (["gone-*"], r"nothing matches the pattern gone-\*"),
        (["a", "pipe:cat x.tar"], "pipe:cat x.tar is a stream"),
        (["a:1", "pipe:cat x.tar:1"], "pipe:cat x.tar:1 is a stream"),
    ],
)
def test_errors(here: Path, specs: list[str], message: str) -> None:
    with pytest.raises(DinoError, match=message):
        open_sources(specs)


def test_shards_stay_a_stream_and_are_indexed_in_a_mixture(here: Path) -> None:
    for name in ("s/x-000.tar", "t/x-000.tar"):
        Path(name).parent.mkdir()
        tarred(Path(name), {"1.png": name.encode(), "1.cls": b"3"})
    stream = open_sources(["s", "t/x-*.tar"])
    assert isinstance(stream, Shards)
    assert [sample.data for sample in stream.stream(0, 1)] == [b"s/x-000.tar", b"t/x-000.tar"]
    mixed = open_sources(["s:1", "a:1"])
    assert (mixed.read(0), mixed.names[0]) == (b"s/x-000.tar", "s/s/x-000.tar/1.png")
