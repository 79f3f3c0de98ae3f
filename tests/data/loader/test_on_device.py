"""Decoding on the device, with torchvision's decoder of the CPU in place of nvJPEG."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dinocli.data.decode import torch_codecs
from dinocli.data.loader import on_device
from dinocli.data.loader.batch import Batch
from dinocli.data.loader.on_device import DeviceCutter
from dinocli.data.loader.train import TrainBatches
from dinocli.data.sources.open import open_source
from dinocli.data.views.crops import ViewConfig, ViewsConfig

pytest.importorskip("torchvision.io")
CPU = torch.device("cpu")
# Without changes of color, the views are the crops: the host and the device change colors in different precision.
GLOBAL = ViewConfig(size=32, scale=(0.4, 1.0), flip=0.5)
VIEWS = ViewsConfig(
    mean=(0.0,) * 3,
    std=(1.0,) * 3,
    global_1=GLOBAL,
    global_2=GLOBAL.model_copy(update={"resample": "bilinear"}),
    local=ViewConfig(size=16, scale=(0.05, 0.4)),
    locals=3,
)


def photo(seed: int) -> Image.Image:
    """Draw smooth colors with an edge, which differ at every place of the picture."""
    smooth = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(smooth).resize((90 + seed, 70), Image.Resampling.BICUBIC)
    image.paste((250, 30, 60), (20, 10, 50, 30))
    return image


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A folder of files of every kind; the last is truncated."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    best = {"quality": 95, "subsampling": 0}
    photo(0).save(folder / "00.jpg", **best)
    photo(1).save(folder / "01.png")
    photo(2).convert("L").save(folder / "02.jpg", **best)
    photo(3).convert("CMYK").save(folder / "03.jpg", **best)
    photo(4).save(folder / "04.jpg", exif=exif, **best)
    photo(5).save(folder / "05.jpg", progressive=True, **best)
    photo(6).save(folder / "06.jpg", quality=95, subsampling=2)
    photo(7).save(folder / "07.jpg", **best)
    data = (folder / "07.jpg").read_bytes()
    (folder / "07.jpg").write_bytes(data[: len(data) // 2])
    return folder


def take(folder: Path, on_device: bool, count: int = 2, **options: object) -> tuple[list[Batch], TrainBatches]:
    stream = TrainBatches(
        open_source(str(folder)), VIEWS, batch_size=8, seed=3, device=CPU, on_device=on_device, **options
    )
    try:
        return list(islice(stream, count)), stream
    finally:
        stream.close()


def compare(here: list[Batch], there: list[Batch]) -> float:
    """Return the largest difference between the crops of two lists of batches, in levels."""
    pairs = [(a, b) for x, y in zip(here, there, strict=True) for a, b in zip(x.crops, y.crops, strict=True)]
    pairs += [(x.clean_crops, y.clean_crops) for x, y in zip(here, there, strict=True) if x.clean_crops is not None]
    assert all(x.rows.equal(y.rows) for x, y in zip(here, there, strict=True))
    return max(255 * (a - b).abs().max().item() for a, b in pairs)


@pytest.mark.parametrize("options", [{}, {"workers": 1}, {"clean": 2.0}])
def test_a_mixed_batch_has_the_crops_of_the_host(mixed: Path, options: dict[str, object]) -> None:
    (here, host), (there, device) = take(mixed, False, **options), take(mixed, True, **options)
    assert compare(here, there) <= 3
    assert host.bad.reasons == device.bad.reasons
    assert list(device.bad.reasons) == ["07.jpg"]
    # The color photo, the grey one and the turned one; one of them may replace the truncated file.
    assert 3 / 8 <= device.share_on_device <= 4 / 8
    assert host.share_on_device is None


def test_the_host_decodes_what_the_device_refuses(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, _ = take(mixed, False)

    def refuse_grey(data: list[Tensor], where: torch.device) -> list[Tensor | None]:
        found = torch_codecs.decode_jpegs(data, where)
        return [None if one is not None and (one[0] == one[1]).all() else one for one in found]

    monkeypatch.setattr(on_device, "decode_jpegs", refuse_grey)
    there, device = take(mixed, True)
    assert compare(here, there) <= 3
    assert 2 / 8 <= device.share_on_device <= 3 / 8


def test_a_file_that_the_device_finds_corrupt_is_replaced_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(24):
        photo(number).save(tmp_path / f"{number:02}.jpg", quality=95, subsampling=0)
    monkeypatch.setattr(on_device, "decode_jpegs", lambda data, where: [None] * len(data))
    (tmp_path / "05.jpg").write_bytes((tmp_path / "05.jpg").read_bytes()[:400] + bytes(200) + b"\xff\xd9")
    here, host = take(tmp_path, False, 3)
    there, device = take(tmp_path, True, 3)
    assert compare(here, there) == pytest.approx(0, abs=1e-3), "all crops are those of the host"
    assert list(host.bad.reasons) == list(device.bad.reasons) == ["05.jpg"]
    assert device.share_on_device == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_a_device_that_decodes_no_file_of_a_batch_is_no_longer_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    for number in range(24):
        photo(number).save(tmp_path / f"{number:02}.jpg", quality=95, subsampling=0)
    asked, left = list[int](), list[int]()
    decode = DeviceCutter.decode

    def refuse(data: list[Tensor], where: torch.device) -> list[Tensor | None]:
        asked.append(len(data))
        return [None] * len(data)

    def count(cutter: DeviceCutter, slot: dict[str, Tensor]) -> object:
        left.append(int(slot["lengths"].count_nonzero()))
        return decode(cutter, slot)

    monkeypatch.setattr(on_device, "decode_jpegs", refuse)
    monkeypatch.setattr(DeviceCutter, "decode", count)
    here, _ = take(tmp_path, False, 9, workers=workers)
    notes: list[str] = []
    there, device = take(tmp_path, True, 9, workers=workers, note=notes.append)
    assert compare(here, there) == pytest.approx(0, abs=1e-3), "all crops are those of the host"
    assert device.share_on_device == 0
    assert asked == [8]
    assert notes == ["note: cpu decoded none of 8 JPEGs; the workers decode from now on"]
    assert left[0] == 8 and left[-1] == 0, "the workers leave no file to the device"


def test_a_device_that_refuses_a_few_files_is_asked_again(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, notes = list[int](), list[str]()

    def refuse(data: list[Tensor], where: torch.device) -> list[Tensor | None]:
        asked.append(len(data))
        return [None] * len(data)

    monkeypatch.setattr(on_device, "decode_jpegs", refuse)
    take(mixed, True, 3, note=notes.append)
    assert len(asked) == 3 and max(asked) < 8
    assert not notes


@pytest.mark.gpu
def test_nvjpeg_gives_the_crops_of_the_host(mixed: Path) -> None:
    here, _ = take(mixed, False)
    stream = TrainBatches(
        open_source(str(mixed)), VIEWS, batch_size=8, seed=3, device=torch.device("cuda"), on_device=True
    )
    there = list(islice(stream, 2))
    stream.close()
    for x, y in zip(here, there, strict=True):
        assert x.rows.equal(y.rows)
        for a, b in zip(x.crops, y.crops, strict=True):
            assert 255 * (a - b.cpu()).abs().max() <= 5, "its own rounding, of each band, is added"
    assert stream.share_on_device > 0.3
