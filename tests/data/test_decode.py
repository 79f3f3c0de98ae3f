from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from dinocli.data import decode as module
from dinocli.data.decode import BadImage, decode


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


RAMP = np.tile(np.linspace(0, 1, 32), (16, 1))


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "CMYK", "LA", "RGBA"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    kind = "TIFF" if mode == "CMYK" else "PNG"
    pixels = decode(saved(Image.fromarray(np.uint8(RAMP * 255)).convert("RGB").convert(mode), kind))
    assert pixels.shape == (16, 32, 3)
    assert pixels.dtype == np.uint8
    assert pixels[:, -1].mean() > 200 > 60 > pixels[:, 0].mean()


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (np.uint16(RAMP * 65535), "PNG"),
        (np.float32(RAMP), "TIFF"),
        (np.float32(RAMP * 255), "TIFF"),
        (np.int32(RAMP * 65535), "TIFF"),
    ],
)
def test_deep_grey_is_scaled_and_neither_white_nor_black(values: np.ndarray, kind: str) -> None:
    pixels = decode(saved(Image.fromarray(values), kind))
    np.testing.assert_allclose(pixels[..., 0], RAMP * 255, atol=1.1)


def test_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    assert decode(saved(Image.new("RGB", (40, 20)), "JPEG", exif=exif)).shape == (40, 20, 3)


def test_transparency_is_laid_on_white() -> None:
    assert decode(saved(Image.new("RGBA", (4, 4), (10, 20, 30, 0)))).min() == 255


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    assert decode(saved(frames[0], "GIF", save_all=True, append_images=frames[1:]))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not an image",
        saved(Image.effect_noise((64, 64), 50), "PNG")[:900],
        saved(Image.effect_noise((64, 64), 50), "JPEG")[:700],
    ],
)
def test_a_bad_file_is_a_value_with_its_reason(data: bytes) -> None:
    bad = decode(data)
    assert isinstance(bad, BadImage)
    assert bad.reason


def test_an_image_beyond_the_limit_is_refused_before_it_is_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PIXELS", 1000)
    assert decode(saved(Image.new("RGB", (40, 40)))) == BadImage("40x40 is over 0 megapixels")
