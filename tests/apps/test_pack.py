from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_images
from PIL import Image

from dinocli.apps import pack as packing
from dinocli.apps.pack import Packed, pack
from dinocli.cli.pack import pack as command
from dinocli.core.errors import DinoError
from dinocli.data.decode.image import decode
from dinocli.data.images import ImagesConfig
from dinocli.data.loader.cache import kept_side
from dinocli.data.sources.open import image_folder, open_images, open_source
from dinocli.data.sources.shards import open_shards
from dinocli.data.views.crops import shrink
from dinocli.method.preset import load_preset


@dataclass
class Listed:
    """Image source with only the attributes that packing uses."""

    root: Path
    names: Sequence[str]
    labels: np.ndarray
    classes: list[str] = field(default_factory=list)
    held: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    clash: str = ""
    in_files: bool = True

    @property
    def where(self) -> str:
        return str(self.root)

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int, images: ImagesConfig) -> Any:
        name = self.names[index]
        return self.held[name] if name in self.held else (self.root / name).read_bytes()


def listed(root: Path, labelled: bool = False) -> Listed:
    names = sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())
    classes = sorted({name.split("/")[0] for name in names}) if labelled else []
    labels = [classes.index(name.split("/")[0]) if labelled else -1 for name in names]
    return Listed(root, names, np.array(labels, dtype=np.int32), classes)


@pytest.fixture
def images_decode(monkeypatch) -> None:
    """Let `decode` accept Pillow images, as a torchvision set returns them."""

    def decode_any(data: Any, images: ImagesConfig) -> Any:
        return decode(data, images) if isinstance(data, bytes) else np.array(data.convert("RGB"))

    monkeypatch.setattr(packing, "decode", decode_any)


def files(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in out.iterdir()}


def test_each_image_is_packed_once_with_its_label_in_random_order(tmp_path: Path, images: Path) -> None:
    source = listed(images, labelled=True)
    done = []
    packed = pack(source, tmp_path / "out", per_shard=5, report=done.append)
    shards = open_shards(str(tmp_path / "out"))
    samples = list(shards.stream(0, 1))
    assert (packed.shards, packed.kept, packed.images, packed.bad) == (3, 0, 12, {})
    assert (shards.counts, shards.classes, done) == ([5, 5, 2], ["a", "b"], [5, 10, 12])
    assert packed.bytes == sum(p.stat().st_size for p in (tmp_path / "out").glob("*.tar"))
    assert packed.faster and packed.faster > 0
    names = [sample.name.split("/", 1)[1] for sample in samples]
    assert sorted(names) == source.names and names != source.names
    for name, sample in zip(names, samples, strict=True):
        assert (sample.data, sample.label) == ((images / name).read_bytes(), source.classes.index(name[0]))
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["shards"] == {"images-000000.tar": 5, "images-000001.tar": 5, "images-000002.tar": 2}


def test_side_shrinks_large_images_and_keeps_small_ones(tmp_path: Path) -> None:
    root = tmp_path / "images"
    root.mkdir()
    wide, small = Image.new("RGB", (100, 50), (200, 10, 10)), Image.new("RGB", (90, 20), (0, 0, 200))
    turned = Image.Exif()
    turned[0x0112] = 6
    wide.save(root / "wide.png")
    wide.save(root / "turned.jpg", exif=turned)
    small.save(root / "small.png")
    pack(listed(root), tmp_path / "out", side=25)
    read = {s.name.split("/")[1]: decode(s.data) for s in open_shards(str(tmp_path / "out")).stream(0, 1)}
    assert {name: pixels.shape for name, pixels in read.items()} == {
        "wide.jpg": (25, 50, 3),
        "turned.jpg": (50, 25, 3),
        "small.png": (20, 90, 3),
    }
    assert np.abs(read["wide.jpg"].astype(int) - (200, 10, 10)).max() < 4


def test_a_resumed_packing_writes_identical_shards(tmp_path: Path, images: Path) -> None:
    (images / "a" / "0000.png").write_bytes(b"no image")
    source = listed(images)

    def killed(images: int) -> None:
        if images > 5:
            raise KeyboardInterrupt

    for side in (None, 16):
        complete, resumed = tmp_path / f"whole{side}", tmp_path / f"broken{side}"
        pack(source, complete, side=side, per_shard=5)
        with pytest.raises(KeyboardInterrupt):
            pack(source, resumed, side=side, per_shard=5, report=killed)
        assert sorted(files(resumed)) == ["images-000000.tar", "pack.json"]
        (resumed / "images-000001.tar").write_bytes(b"half")  # a truncated copy
        assert pack(source, resumed, side=side, per_shard=5).kept == 1
        again = pack(source, resumed, side=side, per_shard=5)
        assert (again.kept, again.images, list(again.bad)) == (3, 11, ["a/0000.png"])
        assert files(resumed) == files(complete)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"per_shard": 4}, "--per-shard 5; this call has --per-shard 4"),
        ({"side": 8}, "no --short-side; this call has --short-side 8"),
    ],
)
def test_resuming_with_other_settings_or_images_is_an_error_that_names_them(
    tmp_path: Path, images: Path, change, said: str
) -> None:
    pack(listed(images), tmp_path / "out", per_shard=5)
    with pytest.raises(DinoError, match=said):
        pack(listed(images), tmp_path / "out", **{"per_shard": 5} | change)
    (images / "a" / "0000.png").rename(images / "a" / "new.png")
    with pytest.raises(DinoError, match="listing"):
        pack(listed(images), tmp_path / "out", per_shard=5)


def test_a_folder_with_foreign_tar_files_is_refused(tmp_path: Path, images: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x.tar").touch()
    with pytest.raises(DinoError, match=r"no pack\.json"):
        pack(listed(images), tmp_path / "out")


def test_bad_images_are_skipped_and_reported(tmp_path: Path, images: Path) -> None:
    source = listed(images)
    (images / "a" / "0001.png").write_bytes(b"no image")
    (images / "b" / "0002.png").unlink()
    packed = pack(source, tmp_path / "out", per_shard=1)
    assert packed.images == 10 and sorted(packed.bad) == ["a/0001.png", "b/0002.png"]
    assert "not an image" in packed.bad["a/0001.png"] and "No such file" in packed.bad["b/0002.png"]
    assert sum(open_shards(str(tmp_path / "out")).counts) == 10
    for path in images.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(DinoError, match="none of the 12 images"):
        pack(source, tmp_path / "none")


def test_keys_are_unique_and_contain_no_dots(tmp_path: Path, images_decode: None) -> None:
    png = (write_images(tmp_path / "x", 1) / "0000.png").read_bytes()
    names = [
        "a.png", "a.PNG", "b.c.png", "b_c.png", "b~1.png", "../up.png", "/abs.png", "__x__/y.png", "v1.5/ü 花.png",
        "lang/" * 40 + "n" * 200 + ".png", "bare", "line\nbreak.png", "x.unknown", "odd\udcff.png", "7",
    ]  # fmt: skip
    source = Listed(tmp_path, names, np.arange(len(names), dtype=np.int32), held=dict.fromkeys(names, png))
    source.held["7"] = Image.new("RGB", (8, 8), (1, 2, 3))
    pack(source, tmp_path / "out")
    samples = list(open_shards(str(tmp_path / "out")).stream(0, 1))
    keys = {s.label: s.name.split("/", 1)[1] for s in samples}
    assert sorted(keys) == list(range(len(names))) and len(set(keys.values())) == len(names)
    assert all(key.count(".") == 1 and not key.startswith("__") for key in keys.values())
    assert keys[0] == "a~0.png" and keys[1] == "a~1.png" and keys[2] == "b_c~2.png"
    assert keys[8] == "v1_5/ü 花.png" and keys[10] == "bare.png" and keys[13] == "odd\udcff.png"
    with tarfile.open(tmp_path / "out" / "images-000000.tar") as tar:
        assert sorted(tar.getnames()) == sorted(n for key in keys.values() for n in (key, key.rsplit(".")[0] + ".cls"))
    seven = next(s for s in samples if s.label == 14)
    assert np.array_equal(decode(seven.data), np.full((8, 8, 3), (1, 2, 3)))


def test_read_speed_is_not_measured_without_source_files(tmp_path: Path, images_decode: None) -> None:
    names = ["0", "1"]
    source = Listed(tmp_path / "none", names, np.array([0, 1]), held={n: Image.new("RGB", (40, 40)) for n in names})
    assert pack(source, tmp_path / "out", side=16).faster is None
    assert [Image.open(io.BytesIO(s.data)).size for s in open_shards(str(tmp_path / "out")).stream(0, 1)] == [
        (16, 16)
    ] * 2


@pytest.mark.parametrize("kept", [True, False])
def test_speed_counts_as_cold_only_if_every_file_left_the_cache(
    tmp_path: Path, images: Path, monkeypatch, kept: bool
) -> None:
    monkeypatch.setattr(packing, "_drop_from_cache", lambda path: not (kept and path.suffix == ".tar"))
    assert pack(listed(images), tmp_path / "out").cold is not kept


def test_the_command_reports_skipped_images_and_prints_json(tmp_path: Path, images: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("dinocli.data.sources.open.open_images", lambda spec: listed(Path(spec)), raising=False)
    (images / "a" / "0001.png").write_bytes(b"no image")
    out = tmp_path / "out"
    command(str(images), out, short_side=16, per_shard=6, name="train")
    first = capsys.readouterr()
    assert "skipped a/0001.png: not an image" in first.err and f"next: dino pretrain {out}" in first.err
    assert {"train-000000.tar", "train-000001.tar"} < set(files(out))
    command(str(images), out, short_side=16, per_shard=6, name="train", json=True)
    second = capsys.readouterr()
    assert "reused 2 of 2" in second.err
    printed = json.loads(second.out)
    assert (printed["path"], printed["images"], printed["kept"]) == (str(out), 11, 2)
    assert set(printed) == {"path", *Packed.__dataclass_fields__}


@pytest.mark.parametrize(
    ("name", "plain"), [("", "images"), ("a/b", "b"), (".x", "x"), ("a b\\c*?", "a-b-c"), ("-", "images"), ("a\n", "a")]
)
def test_a_prefix_that_is_no_plain_name_is_an_error(tmp_path: Path, images: Path, name: str, plain: str) -> None:
    with pytest.raises(DinoError, match="is not a plain name") as error:
        command(str(images), tmp_path / "out", name=name)
    assert error.value.hint == f"--name {plain}"
    assert not (tmp_path / "out").exists()


def test_many_unreadable_images_are_counted_by_reason(tmp_path: Path, images: Path, capsys) -> None:
    names = sorted(path for path in images.rglob("*.png"))
    for path in names[:4]:
        path.write_bytes(b"no image")
    for path in names[4:7]:
        path.write_bytes(path.read_bytes()[:60])
    command(str(images), tmp_path / "out")
    said = capsys.readouterr().err
    assert "skipped 7 images that could not be read: 4 not an image, 3 truncated; " in said
    assert f"{tmp_path / 'out' / 'pack.json'} lists them" in said.replace("\n", "")
    assert "0000.png" not in said


def test_the_place_of_the_images_may_be_written_in_another_way(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.chdir(images.parent)
    pack(open_images(images.name), out, per_shard=5)
    assert pack(open_images(str(images)), out, per_shard=5).kept == 3
    stored = json.loads((out / "pack.json").read_text())
    stored.pop("crc32", None)
    stored["settings"]["source"] = images.name  # as earlier versions stored it
    (out / "pack.json").write_text(json.dumps(stored))
    assert pack(open_images(str(images)), out, per_shard=5).kept == 3
    shutil.copytree(images, tmp_path / "copy")
    with pytest.raises(DinoError, match=r"packed with source .*; this call has source .*copy"):
        pack(open_images(str(tmp_path / "copy")), out, per_shard=5)


def test_a_stopped_packing_says_how_to_resume(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    write = packing._write_tar
    shards: list[Path] = []
    monkeypatch.setattr(
        packing, "_write_tar", lambda source, path, made: shards.append(path) or (write if len(shards) < 2 else stop)(source, path, made)
    )  # fmt: skip
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        command(str(images), out, per_shard=5)
    assert f"{out} is not complete; run the same command to resume" in capsys.readouterr().err.replace("\n", "")
    monkeypatch.setattr(packing, "_write_tar", write)
    command(str(images), out, per_shard=5)
    assert "reused 1 of 3 shards" in capsys.readouterr().err


def test_arrays_are_packed_unchanged_or_shrunk_as_arrays(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    values = np.random.default_rng(0).integers(0, 4000, (3, 40, 60, 13)).astype(np.uint16)
    for i, each in enumerate(values):
        np.save(tmp_path / "in" / f"{i}.npy", each)
    np.save(tmp_path / "in" / "other.npy", values[0, ..., :3])
    taken = ImagesConfig(channels=13, window=(0, 4000))
    for side, shape, kind in ((None, (40, 60, 13), np.uint16), (20, (20, 30, 13), np.uint8)):
        out = tmp_path / f"out{side}"
        done = pack(listed(tmp_path / "in"), out, side=side, images=taken)
        assert (done.images, list(done.bad)) == (3, ["other.npy"])
        found = {s.name[-5:]: np.load(io.BytesIO(s.data)) for s in open_shards(str(out)).stream(0, 1)}
        for i in range(3):
            assert (found[f"{i}.npy"].shape, found[f"{i}.npy"].dtype) == (shape, kind)
        if side is None:
            assert np.array_equal(found["2.npy"], values[2])
    with pytest.raises(DinoError, match=r"was packed with --set images.*; this call has no --set"):
        pack(listed(tmp_path / "in"), tmp_path / "out20", side=20)


def test_shrunk_gray_images_stay_gray(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Image.fromarray(np.tile(np.arange(100, dtype=np.uint16) * 600, (100, 1))).save(tmp_path / "in" / "a.png")
    pack(listed(tmp_path / "in"), tmp_path / "out", side=32, images=ImagesConfig(channels=1))
    (sample,) = open_shards(str(tmp_path / "out")).stream(0, 1)
    assert Image.open(io.BytesIO(sample.data)).mode == "L"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[" * 100_000,
        "[]",
        "{}",
        '{"settings": {}, "shards": []}',
        '{"settings": {}, "shards": {"x": {}}}',
        None,
    ],
)
def test_corrupt_settings_give_a_one_line_error(tmp_path: Path, images: Path, text: str | None) -> None:
    source = image_folder(images)
    pack(source, tmp_path / "out")
    stored = tmp_path / "out" / "pack.json"
    stored.write_text(stored.read_text().replace('"images": 12', '"images": 13') if text is None else text)
    with pytest.raises(DinoError, match=r"pack\.json is corrupt") as error:
        pack(source, tmp_path / "out")
    assert "\n" not in error.value.message
    assert "line 1" not in error.value.message, "no text of the library"


def test_packed_pixels_are_the_decoded_and_shrunk_images_in_their_order(tmp_path: Path) -> None:
    write_images(tmp_path / "in" / "a", 3, size=40)
    write_images(tmp_path / "in" / "b", 2, size=23, seed=1)
    source = image_folder(tmp_path / "in")
    done = []
    packed = pack(source, tmp_path / "out", side=24, per_shard=2, pixels=True, report=done.append)
    assert (packed.shards, packed.kept, packed.images, packed.faster, done) == (3, 0, 5, None, [2, 4, 5])
    assert packed.bytes == sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors"))
    opened = open_source(str(tmp_path / "out"))
    assert (list(opened.names), opened.classes) == (list(source.names), ["a", "b"])
    assert opened.labels.tolist() == source.labels.tolist() == [0, 0, 0, 1, 1]
    for row in range(5):
        expected = shrink(decode(source.read(row)), 24)
        np.testing.assert_array_equal(opened.read(row), expected)
        np.testing.assert_array_equal(decode(opened.read(row)), expected)


def test_a_resumed_packing_of_pixels_writes_identical_shards(tmp_path: Path, images: Path) -> None:
    (images / "a" / "0000.png").write_bytes(b"no image")
    source = image_folder(images)

    def killed(images: int) -> None:
        if images > 5:
            raise KeyboardInterrupt

    complete, resumed = tmp_path / "whole", tmp_path / "broken"
    pack(source, complete, per_shard=5, pixels=True)
    with pytest.raises(KeyboardInterrupt):
        pack(source, resumed, per_shard=5, pixels=True, report=killed)
    assert sorted(files(resumed)) == ["images-000000.safetensors", "pack.json"]
    with pytest.raises(DinoError, match="incomplete") as error:
        open_source(str(resumed))
    assert "run the same `dino pack`" in str(error.value.hint)
    (resumed / "images-000001.safetensors").write_bytes(b"half")  # a truncated copy
    again = pack(source, resumed, per_shard=5, pixels=True)
    assert (again.kept, again.images, list(again.bad)) == (1, 11, ["a/0000.png"])
    assert files(resumed) == files(complete)
    with pytest.raises(DinoError, match="was packed with"):
        pack(source, resumed, per_shard=5)


def test_the_space_of_pixels_is_stated_first_and_refused_if_the_disk_has_less(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, said = image_folder(images), list[str]()
    pack(source, tmp_path / "out", pixels=True, note=said.append)
    pack(source, tmp_path / "out", pixels=True, note=said.append)  # nothing is missing
    assert len(said) == 1 and said[0].startswith("the pixels take about 0 MB; ")
    usage = shutil.disk_usage(tmp_path)._replace(free=12 * 32 * 32 * 3 - 1)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(DinoError, match="has 0 MB free") as error:
        pack(source, tmp_path / "small", pixels=True, side=32)
    fits = int(error.value.hint.split("--short-side ")[1].split(",")[0])
    assert fits == 31 and "a larger disk" in error.value.hint
    assert not list((tmp_path / "small").glob("*.safetensors"))
    pack(source, tmp_path / "smaller", pixels=True, side=fits)


def test_the_default_side_of_pixels_enlarges_no_crop_of_the_original() -> None:
    assert kept_side(load_preset("vits16").views.all) == packing.PIXELS_SIDE


def test_the_command_packs_pixels_that_another_pack_can_read(tmp_path: Path, images: Path, capsys) -> None:
    command(str(images), tmp_path / "out", pixels=True, per_shard=6, json=True)
    shown = capsys.readouterr()
    assert "the pixels take about" in shown.err and f"next: dino pretrain {tmp_path / 'out'}" in shown.err
    assert json.loads(shown.out)["shards"] == 2
    pack(open_images(str(tmp_path / "out")), tmp_path / "tar", per_shard=12)
    samples = list(open_shards(str(tmp_path / "tar")).stream(0, 1))
    assert sorted(sample.label for sample in samples) == [0] * 6 + [1] * 6
    assert all(decode(sample.data).shape == (32, 32, 3) for sample in samples)


def test_a_refused_call_leaves_the_folder_free_for_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "images", 2)
    source = image_folder(tmp_path / "images")
    free = shutil.disk_usage(tmp_path)._replace(free=10)
    with monkeypatch.context() as full:
        full.setattr("shutil.disk_usage", lambda path: free)
        with pytest.raises(DinoError, match="the pixels take about"):
            pack(source, tmp_path / "out", pixels=True)
    assert pack(source, tmp_path / "out", side=16, pixels=True).images == 2
    with pytest.raises(DinoError, match="packed with --pixels; this call has no --pixels"):
        pack(source, tmp_path / "out", side=16)
    with pytest.raises(DinoError, match="packed with --short-side 16; this call has --short-side 8"):
        pack(source, tmp_path / "out", side=8, pixels=True)


def test_pixels_are_not_packed_into_the_folder_of_the_images(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 2)
    with pytest.raises(DinoError, match="is the folder of the images"):
        pack(image_folder(tmp_path / "images"), tmp_path / "images", pixels=True)
    assert not list((tmp_path / "images").glob("*.json"))
