"""Inspection: known sizes, formats, corrupt files and copies are reported correctly."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import write_images
from PIL import Image

from dinocli.apps.demo.drawings import draw
from dinocli.apps.doctor import inspection
from dinocli.apps.doctor.inspection import inspect, warn_of
from dinocli.data.images import DEFAULTS, ImagesConfig
from dinocli.data.sources.open import Images, TorchvisionImages, open_source, within


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """Write ten drawn images of 64x48 in two classes, and one file of each special kind."""
    folder = tmp_path / "planted"
    for i in range(10):
        place = folder / "ab"[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        picture(i).resize((64, 48)).save(place / f"{i}.jpg", quality=95)
    (folder / "a" / "copy.jpg").write_bytes((folder / "a" / "0.jpg").read_bytes())
    picture(2).resize((32, 24)).save(folder / "b" / "small-2.png")
    picture(3).resize((64, 48)).convert("L").save(folder / "b" / "grey.png")
    Image.new("RGB", (40, 400), (9, 9, 200)).save(folder / "b" / "flat.bmp")
    deep = np.linspace(0, 65535, 48 * 64).astype(np.uint16).reshape(48, 64)
    Image.fromarray(deep).save(folder / "b" / "deep.tif")
    (folder / "a" / "empty.jpg").touch()
    (folder / "a" / "torn.jpg").write_bytes((folder / "a" / "0.jpg").read_bytes()[:700])
    Image.new("RGB", (1, 1)).save(folder / "a" / "dot.png")
    return folder


def picture(index: int) -> Image.Image:
    return Image.fromarray(np.asarray(draw(index, size=64).image))


def test_all_planted_properties_are_reported(planted: Path) -> None:
    progress: list[int] = []
    inspected = inspect(open_source(str(planted)), report=progress.append)
    assert (inspected.kind, inspected.count, inspected.drawn, inspected.read, inspected.classes) == (
        "files",
        18,
        18,
        15,
        2,
    )
    assert inspected.whole
    assert progress[-1] == 18
    assert inspected.formats == {"JPEG": 11, "PNG": 2, "BMP": 1, "TIFF": 1}
    assert (inspected.width.least, inspected.width.median, inspected.width.most) == (32, 64, 64)
    assert (inspected.height.least, inspected.height.most) == (24, 400)
    assert (inspected.short.least, inspected.short.median, inspected.aspect.most) == (24, 48, 10)
    assert (inspected.deep, inspected.flat, inspected.copies) == (1, 1, 1)
    assert inspected.gray == 2
    assert {name.split("/")[1]: reason.split(":")[0] for name, reason in inspected.bad.items()} == {
        "empty.jpg": "empty", "torn.jpg": "truncated", "dot.png": "too small",
    }  # fmt: skip
    # The gray copy may be a near-duplicate too; the smaller copy always is.
    assert inspected.near >= 1
    assert {"a/2.jpg", "b/small-2.png"} in [{pair.first, pair.second} for pair in inspected.pairs]
    assert inspected.milliseconds > 0


def test_mean_and_std_are_those_of_the_pixels(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "noise", 6, size=20)
    Image.new("RGB", (20, 20), (0, 0, 255)).save(folder / "blue.png")
    pixels = np.stack([np.asarray(Image.open(path)) for path in sorted(folder.iterdir())]) / 255
    inspected = inspect(open_source(str(folder)))
    np.testing.assert_allclose(inspected.mean, pixels.mean(axis=(0, 1, 2)), rtol=1e-9)
    np.testing.assert_allclose(inspected.std, pixels.std(axis=(0, 1, 2)), rtol=1e-9)
    assert inspected.megabytes == pytest.approx(20 * 20 * 3e-6)


def test_the_sample_is_random_and_reproducible(tmp_path: Path) -> None:
    source = open_source(str(write_images(tmp_path / "noise", 60, size=8)))
    assert isinstance(source, Images)
    read: list[int] = []
    watched = type(
        "Watched", (Images,), {"read": lambda self, row, images: (read.append(row), source.read(row, images))[1]}
    )
    spied = watched(source.where, source.root, source.names, source.classes, source.labels)
    draws = []
    for seed in (0, 0, 1):
        read.clear()
        inspected = inspect(spied, sample=20, seed=seed)
        draws.append(sorted(read))
        assert (inspected.drawn, inspected.count, inspected.whole) == (20, 60, False)
    assert draws[0] == draws[1] != draws[2]
    assert len(set(draws[0])) == 20
    assert max(draws[0]) > 30


def test_the_inspection_ends_at_its_time_limit(tmp_path: Path) -> None:
    source = open_source(str(write_images(tmp_path / "noise", 200, size=8)))
    assert inspect(source, seconds=0).drawn == 0
    assert inspect(source, seconds=1e-4).drawn < 200


def test_a_source_without_readable_images_is_reported(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(b"no image at all")
    inspected = inspect(open_source(str(tmp_path)))
    assert (inspected.drawn, inspected.read, inspected.formats, inspected.near, len(inspected.bad)) == (3, 0, {}, 0, 3)


def test_a_missing_file_is_reported_as_bad(tmp_path: Path) -> None:
    source = open_source(str(write_images(tmp_path / "noise", 3)))
    (tmp_path / "noise" / "0001.png").unlink()
    assert inspect(source).bad == {"0001.png": "cannot be opened: No such file or directory"}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Write three tar files of ten red, green or blue images; the last one is truncated."""
    for shard, color in enumerate([(255, 0, 0), (0, 255, 0), (0, 0, 255)]):
        with tarfile.open(tmp_path / f"x-{shard}.tar", "w") as tar:
            for i in range(10):
                file = io.BytesIO()
                Image.new("RGB", (8 + i, 8), color).save(file, "PNG")
                member = tarfile.TarInfo(f"{i}.png")
                member.size = file.tell()
                tar.addfile(member, io.BytesIO(file.getvalue()))
    last = tmp_path / "x-2.tar"
    last.write_bytes(last.read_bytes()[: 9 * 1024 + 600])
    return tmp_path


def test_the_sample_comes_from_all_shards(shards: Path) -> None:
    inspected = inspect(open_source(str(shards)), sample=12)
    assert (inspected.kind, inspected.count, inspected.drawn, inspected.read) == ("shards", 30, 12, 12)
    assert all(share > 0.2 for share in inspected.mean)  # four of each color
    every = inspect(open_source(str(shards)))
    assert (every.drawn, every.read, every.width.most) == (30, 29, 17)
    assert list(every.bad) == ["x-2.tar"]


def test_the_sample_of_a_pipe_is_its_first_images(shards: Path) -> None:
    inspected = inspect(open_source(f"pipe:cat {shards}/x-{{0..1}}.tar"), sample=6)
    assert (inspected.count, inspected.drawn, inspected.read) == (None, 6, 6)
    assert not inspected.whole


def test_decoded_images_have_no_format(tmp_path: Path) -> None:
    source = open_source(str(write_images(tmp_path / "noise", 5, size=16)))
    assert isinstance(source, Images)
    pictures = [(Image.open(tmp_path / "noise" / name).convert("RGB"), 0) for name in source.names]
    pictures.append(pictures[0])
    names = type(source.names).of([str(i) for i in range(6)])
    inspected = inspect(TorchvisionImages("torchvision:X", Path("x"), names, [], np.zeros(6, np.int32), pictures))
    assert (inspected.kind, inspected.formats, inspected.copies, inspected.whole) == (
        "decoded",
        {"decoded": 6},
        1,
        True,
    )


def test_mean_and_std_of_any_channels(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 4000, (5, 20, 24, 13)).astype(np.uint16)
    for i, each in enumerate(pixels):
        np.save(tmp_path / f"{i}.npy", each)
    np.save(tmp_path / "other.npy", pixels[0, ..., :4])
    inspected = inspect(open_source(str(tmp_path)), images=ImagesConfig(channels=13, window=(0, 4000)))
    np.testing.assert_allclose(inspected.mean, pixels.mean((0, 1, 2)) / 4000, atol=1e-4)
    np.testing.assert_allclose(inspected.std, pixels.std((0, 1, 2)) / 4000, atol=1e-4)
    assert (inspected.read, inspected.deep, inspected.gray, inspected.formats) == (5, 5, 0, {"NPY": 5})
    assert inspected.bad == {"other.npy": "other channels: an array of 20x24x4; expected 13 (images.channels)"}
    assert inspected.megabytes == pytest.approx(20 * 24 * 13e-6)


def deep_images(folder: Path, high: int, count: int = 24, low: int = 0) -> Path:
    """Write 16-bit gray images of waves with values from `low` to `high`."""
    folder.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[:40, :40]
    for i in range(count):
        wave = (1 + np.sin(x / (2 + i % 5) + i) * np.cos(y / (2 + i % 3))) / 2
        Image.fromarray((low + (high - low) * wave).round().astype(np.uint16)).save(folder / f"{i}.png")
    return folder


def test_deep_images_of_low_contrast_get_a_measured_window(tmp_path: Path) -> None:
    inspected = inspect(open_source(str(deep_images(tmp_path / "a", 100))))
    assert (inspected.window, inspected.narrow, inspected.single, inspected.deep) == ((0, 100), 24, 0, 24)
    assert 0.4 < inspected.mean[0] < 0.6 and 0.15 < inspected.std[0] < 0.35, "with the window applied"
    inspected = inspect(open_source(str(deep_images(tmp_path / "b", 40200, low=40000))))
    np.testing.assert_allclose(inspected.window, (40000, 40200), atol=1)
    asked = inspect(open_source(str(tmp_path / "a")), images=ImagesConfig(window=(0, 1000)))
    assert asked.window is None and asked.mean[0] < 0.1, "a requested window is kept"
    assert inspect(open_source(str(deep_images(tmp_path / "c", 65535)))).window is None
    mixed = deep_images(tmp_path / "d", 100, count=8)
    assert inspect(open_source(str(deep_images(mixed / "full", 65535, count=3)))).window is None
    assert inspect(open_source(str(mixed))).window is None, "it would clip the others"
    dark = tmp_path / "e"
    dark.mkdir()
    for i in range(5):
        Image.fromarray(np.arange(1600, dtype=np.uint8).reshape(40, 40) % (20 + i)).save(dark / f"{i}.png")
    inspected = inspect(open_source(str(dark)))
    assert (inspected.window, inspected.narrow) == (None, 5), "a window does not affect 8 bits"
    among = write_images(tmp_path / "f", 12)
    inspected = inspect(open_source(str(deep_images(among / "deep", 100, count=5).parent)))
    assert (inspected.window, inspected.deep, inspected.single) == ((0, 100), 5, 0), "8-bit images do not count"


def test_lost_contrast_is_warned_of_before_a_run(tmp_path: Path) -> None:
    def warn(folder: Path, images: ImagesConfig = DEFAULTS) -> list[str]:
        return warn_of(open_source(str(folder)), images)

    deep = deep_images(tmp_path / "deep", 100)
    assert warn(deep) == [
        "24 of 24 images are a single color after conversion to 8 bits; raw values span 0 to 100: "
        "--set images.window='[0, 100]'"
    ]
    assert warn(deep, ImagesConfig(window=(0, 100))) == []
    (line,) = warn(deep_images(tmp_path / "nearly", 1000))
    assert line.startswith("24 of 24 images are a single color or nearly so after") and "span 0 to 1000" in line
    assert warn(deep_images(tmp_path / "full", 65535)) == []
    flat = write_images(tmp_path / "flat", 70, size=8)
    assert warn(flat) == []
    for path in flat.iterdir():
        Image.new("RGB", (8, 8), (9, 99, 9)).save(path)
    assert warn(flat) == ["64 of 64 sampled images are a single color after conversion to 8 bits"]
    for i, path in enumerate(sorted(flat.iterdir())):
        Image.fromarray(np.random.default_rng(i).integers(99, 102, (8, 8), dtype=np.uint8)).save(path)
    assert warn(flat) == [], "8 bits of low contrast lose nothing"
    Image.new("RGB", (8, 8)).save(tmp_path / "full" / "blank.png")
    assert warn(tmp_path / "full") == ["1 of 25 images is a single color after conversion to 8 bits"]


def test_pages_that_are_not_read_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path, 4)
    opened = inspection.open_image

    def paged(data: bytes, images: ImagesConfig) -> object:
        found = opened(data, images)
        found.pages = 3 if data == (tmp_path / "0001.png").read_bytes() else 1  # type: ignore[union-attr]
        return found

    monkeypatch.setattr(inspection, "open_image", paged)
    source = open_source(str(tmp_path))
    assert inspect(source).several == 1
    assert warn_of(source, ImagesConfig()) == [
        "1 of 4 images has several pages or frames; only the first is read (see images.pages)"
    ]


def test_frames_that_are_read_as_images_are_no_loss(tmp_path: Path) -> None:
    pytest.importorskip("pydicom", minversion="3")
    from medical_files import dicom

    frames = np.random.default_rng(0).integers(0, 255, (3, 16, 16), dtype=np.uint8)
    (tmp_path / "a.dcm").write_bytes(dicom(frames, frames=3))
    source, every = open_source(str(tmp_path)), ImagesConfig(pages="all")
    assert "1 of 1 images has several pages or frames" in warn_of(source, ImagesConfig())[-1]
    assert len(within(source, every)) == 3 and warn_of(within(source, every), every) == []


def test_few_shards_are_opened_for_few_images(shards: Path) -> None:
    assert warn_of(open_source(str(shards)), ImagesConfig(), sample=6) == [
        "6 of 6 sampled images are a single color after conversion to 8 bits"
    ]


def test_deep_colors_count_as_deep(tmp_path: Path) -> None:
    imagecodecs, tifffile = pytest.importorskip("imagecodecs"), pytest.importorskip("tifffile")
    values = np.random.default_rng(0).integers(0, 65536, (40, 60, 3), dtype=np.uint16)
    (tmp_path / "a.jp2").write_bytes(imagecodecs.jpeg2k_encode(values, level=0))
    (tmp_path / "b.png").write_bytes(imagecodecs.png_encode(values))
    tifffile.imwrite(tmp_path / "c.tif", values, photometric="rgb")
    (tmp_path / "d.ppm").write_bytes(b"P6 60 40 65535\n" + values.astype(">u2").tobytes())
    (tmp_path / "e.jp2").write_bytes(imagecodecs.jpeg2k_encode(np.uint8(values >> 8), level=0))
    inspected = inspect(open_source(str(tmp_path)))
    assert (inspected.read, inspected.deep) == (5, 4)
    assert inspected.formats == {"JPEG2000": 2, "PNG": 1, "TIFF": 1, "PPM": 1}
