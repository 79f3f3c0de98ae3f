from __future__ import annotations

import io
import os
import warnings

import numpy as np
import pytest
from PIL import Image
from test_image import photo, reason, saved

from dinocli.data.decode.image import decode
from dinocli.data.decode.pixels import BadImage
from dinocli.data.images import ImagesConfig


@pytest.mark.parametrize(
    "program", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"%PDF-1.4\n", b"\xd7\xcd\xc6\x9a" + bytes(99)]
)
def test_no_format_that_starts_a_program_is_opened(program: bytes) -> None:
    assert reason(program).startswith("not read here: ")


def test_pillows_own_pixel_limit_is_neither_used_nor_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(saved(photo())).shape == (75, 101, 3)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_a_corrupt_tiff_prints_nothing_on_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)).save(
        file, "TIFF", compression="tiff_lzw"
    )
    data = bytearray(file.getvalue())
    data[20:400] = b"\xff" * 380
    assert isinstance(decode(bytes(data)), BadImage)
    assert capfd.readouterr().err == ""
    os.write(2, b"ours")
    assert capfd.readouterr().err == "ours"


def test_pillows_settings_are_restored_after_concurrent_reads() -> None:
    from dinocli.data.decode.pillow import _pillow

    before = Image.MAX_IMAGE_PIXELS
    first, second = _pillow(ImagesConfig(), False), _pillow(ImagesConfig(), False)
    first.__enter__()
    second.__enter__()
    assert Image.MAX_IMAGE_PIXELS == 75_000_000
    first.__exit__(None, None, None)
    assert Image.MAX_IMAGE_PIXELS == 75_000_000, "the second one is still reading"
    second.__exit__(None, None, None)
    assert before == Image.MAX_IMAGE_PIXELS
