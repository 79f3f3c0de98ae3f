from __future__ import annotations

import io
import sys
import types
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image
from test_image import JPEGS, photo, reason, saved

from dinocli.data.decode import torch_codecs as module
from dinocli.data.decode.image import decode


@pytest.fixture(params=["torchvision", "torchcodec", "Pillow"])
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Select each JPEG decoder, as if the preferred ones were not installed."""
    if request.param != "torchvision":
        monkeypatch.setitem(sys.modules, "torchvision.io", None)
    if request.param == "torchcodec":
        pytest.importorskip("torchcodec.decoders")
    if request.param == "Pillow":
        monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    module._jpeg_decoder.cache_clear()
    yield request.param
    module._jpeg_decoder.cache_clear()


@pytest.mark.parametrize("name", JPEGS)
def test_every_decoder_gives_pillows_pixels(decoder: str, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = decode(JPEGS[name])
    wanted = np.asarray(Image.open(io.BytesIO(JPEGS[name])).convert("RGB"))
    assert np.abs(pixels.astype(int) - wanted).max() <= 3
    assert pixels.flags.writeable
    assert pixels.flags.c_contiguous


def test_every_decoder_applies_the_orientation_once(decoder: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    turned = decode(saved(photo(), "JPEG", exif=exif))
    np.testing.assert_array_equal(turned, decode(saved(photo(), "JPEG"))[::-1, ::-1])


def test_every_decoder_refuses_a_truncated_jpeg(decoder: str) -> None:
    for name, data in JPEGS.items():
        if name != "mpo":
            assert reason(data[: len(data) * 2 // 3]).startswith("truncated: ")


def test_decoders_fall_back_to_torchcodec_and_then_to_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def decode_jpeg(data: torch.Tensor) -> torch.Tensor:
        seen.append(bytes(data.numpy()))
        if len(seen) > 1:
            raise RuntimeError("cannot")
        return torch.full((3, 75, 101), 7, dtype=torch.uint8)

    fake = types.ModuleType("torchcodec.decoders")
    fake.decode_jpeg = decode_jpeg
    monkeypatch.setitem(sys.modules, "torchvision.io", None)
    monkeypatch.setitem(sys.modules, "torchcodec", types.ModuleType("torchcodec"))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", fake)
    module._jpeg_decoder.cache_clear()
    assert decode(JPEGS["420"]).max() == 7
    assert decode(JPEGS["420"]).std() > 30
    assert decode(JPEGS["cmyk"]).std() > 30
    exif = Image.Exif()
    exif[0x0112] = 3
    assert decode(saved(photo(), "JPEG", exif=exif)).std() > 30  # torchcodec would apply the orientation a second time
    assert seen == [JPEGS["420"]] * 2
    module._jpeg_decoder.cache_clear()


def test_several_jpegs_are_decoded_and_corrupt_ones_are_none() -> None:
    pytest.importorskip("torchvision.io")
    good = saved(photo(), "JPEG")
    files = [good, good[:300], saved(photo().convert("L"), "JPEG"), b"no picture", good]
    data = [torch.frombuffer(bytearray(each), dtype=torch.uint8) for each in files]
    found = module.decode_jpegs(data, torch.device("cpu"))
    assert [one is None for one in found] == [False, True, False, True, False]
    wanted = np.asarray(Image.open(io.BytesIO(good)).convert("RGB")).astype(int)
    assert np.abs(found[4].permute(1, 2, 0).numpy() - wanted).max() <= 3
    assert found[2].shape == found[0].shape, "grey becomes RGB"


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_a_failure_of_the_device_is_not_that_of_a_file(
    monkeypatch: pytest.MonkeyPatch, kind: type[RuntimeError]
) -> None:
    pytest.importorskip("torchvision.io")
    calls = []

    def fail(*arguments: object) -> None:
        calls.append(arguments)
        raise kind("CUDA out of memory")

    monkeypatch.setattr(torch.ops.image, "decode_jpeg", fail)
    data = [torch.zeros(9, dtype=torch.uint8)] * 4
    with pytest.raises(kind, match="out of memory"):
        module.decode_jpegs(data, torch.device("cpu"))
    assert len(calls) == 1


def test_the_reason_why_a_device_decodes_no_jpegs_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision.io")
    assert module.why_no_jpegs(torch.device("cpu")) is None
    assert module.why_no_jpegs(torch.device("cuda")) or torch.cuda.is_available()
    monkeypatch.setattr(module, "decode_jpegs", lambda data, where: [None])
    assert module.why_no_jpegs(torch.device("cpu")) == "torchvision was built without nvJPEG"
    monkeypatch.setitem(sys.modules, "torchvision.io", None)
    assert "torchvision" in module.why_no_jpegs(torch.device("cpu"))
