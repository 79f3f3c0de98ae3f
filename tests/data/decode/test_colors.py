from __future__ import annotations

import io

import numpy as np
import PIL
import pytest
from PIL import Image
from test_image import DEEP, RAMP, photo, saved, tiff

from dinocli.data.decode.image import Opened, decode, open_image
from dinocli.data.decode.pixels import BadImage
from dinocli.data.images import ImagesConfig


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "CMYK", "LA", "RGBA", "LAB", "YCbCr"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    kind = "TIFF" if mode in ("CMYK", "LAB", "YCbCr") else "PNG"
    data = saved(Image.fromarray(np.uint8(RAMP * 255)).convert("RGB").convert(mode), kind)
    try:
        Image.open(io.BytesIO(data)).load()
    except OSError:
        pytest.skip(f"Pillow {PIL.__version__} does not read what it wrote")
    pixels = decode(data)
    assert pixels.shape == (16, 32, 3)
    assert pixels.dtype == np.uint8
    assert pixels.flags.writeable
    assert pixels[:, -1].mean() > 200 > 60 > pixels[:, 0].mean()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_is_applied_and_known_from_the_header(orientation: int, kind: str) -> None:
    marked = np.zeros((16, 48, 3), np.uint8)
    marked[:8, :24] = 255, 0, 0
    marked[8:, :24] = 0, 0, 255
    shown = Image.fromarray(marked)
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose that undoes the orientation
    stored = shown.transpose(Image.Transpose(turns[orientation])) if orientation > 1 else shown
    exif = Image.Exif()
    exif[0x0112] = orientation
    opened = open_image(saved(stored, kind, exif=exif, **({"quality": 95} if kind in ("JPEG", "WEBP") else {})))
    assert isinstance(opened, Opened)
    assert (opened.height, opened.width) == (16, 48)
    assert np.abs(opened.pixels().astype(int) - marked).mean() < 8


def test_corrupt_exif_is_ignored() -> None:
    assert decode(saved(photo(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")).shape == (75, 101, 3)


def test_transparency_is_composited_on_white() -> None:
    assert decode(saved(Image.new("RGBA", (4, 4), (10, 20, 30, 0)))).min() == 255
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    assert decode(saved(palette, transparency=1)).min() == 255
    assert decode(saved(Image.new("RGB", (4, 4), (9, 8, 7)), transparency=(9, 8, 7))).min() == 255


def test_white_content_stays_visible() -> None:
    drawn = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
    drawn.putpixel((3, 4), (255, 255, 255, 255))
    assert decode(saved(drawn))[4, 3].tolist() == [255] * 3
    assert decode(saved(drawn)).min() == 0  # white on transparent is composited on black
    unused = photo().convert("RGBA")
    unused.putalpha(0)
    np.testing.assert_array_equal(decode(saved(unused)), np.asarray(photo()))


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_one_channel_equals_pillows_grey_of_three(mode: str, kind: str) -> None:
    image = photo().convert(mode)
    if (kind == "JPEG" and mode in ("P", "RGBA", "LA", "1")) or (kind == "PNG" and mode == "CMYK"):
        pytest.skip("no such file")
    data = saved(image, kind)
    gray = decode(data, ImagesConfig(channels=1))
    assert gray.shape == (75, 101, 1)
    assert np.array_equal(gray[..., 0], np.asarray(Image.fromarray(decode(data)).convert("L")))
    small = open_image(data, ImagesConfig(channels=1)).pixels(2)
    assert small.shape[2] == 1


def test_one_channel_of_16_bits_is_scaled_as_three_are() -> None:
    for data in (tiff(DEEP), saved(Image.fromarray(DEEP)), tiff(RAMP.astype(np.float32))):
        for window in (None, (9000, 50_000)):
            three, one = (decode(data, ImagesConfig(channels=c, window=window)) for c in (3, 1))
            assert np.array_equal(one, three[..., :1])


def test_four_channels_are_unchanged() -> None:
    values = np.random.default_rng(0).integers(0, 256, (20, 30, 4), dtype=np.uint8)
    values[..., 3] //= 9  # as alpha, it would make nearly all pixels white
    for kind in ("PNG", "TIFF", "WEBP"):
        pixels = decode(
            saved(Image.fromarray(values, "RGBA"), kind, lossless=True, exact=True), ImagesConfig(channels=4)
        )
        assert np.array_equal(pixels, values), kind
    assert np.array_equal(decode(Image.fromarray(values, "RGBA"), ImagesConfig(channels=4)), values)
    palette = Image.fromarray(np.zeros((20, 30), np.uint8), "P")
    palette.putpalette([9, 8, 7])
    assert decode(saved(palette, transparency=0), ImagesConfig(channels=4))[0, 0].tolist() == [9, 8, 7, 0]


@pytest.mark.parametrize(
    ("mode", "channels", "came"),
    [("RGB", 4, "3 (RGB)"), ("L", 13, "1 (L)"), ("CMYK", 4, "4 (CMYK)"), ("RGBA", 2, "4 (RGBA)")],
)
def test_another_number_of_channels_is_a_bad_image(mode: str, channels: int, came: str) -> None:
    kind = "TIFF" if mode == "CMYK" else "PNG"
    for data in (saved(photo().convert(mode), kind), photo().convert(mode)):
        bad = decode(data, ImagesConfig(channels=channels))
        assert bad == BadImage(f"other channels: {came}; expected {channels} (images.channels)")
    if mode == "RGB":
        assert isinstance(decode(saved(photo(), "JPEG"), ImagesConfig(channels=4)), BadImage)
