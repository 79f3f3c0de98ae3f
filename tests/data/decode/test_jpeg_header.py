from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image

from dinocli.data.decode.image import decode, open_image
from dinocli.data.decode.jpeg_header import decodes_alike, plain_header
from dinocli.data.decode.pixels import BadImage
from dinocli.data.images import DEFAULTS


def jpeg(mode: str = "RGB", size: tuple[int, int] = (40, 30), **options: object) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels[..., :3]).convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


def with_segment(kind: int, body: bytes) -> bytes:
    data = jpeg()
    return data[:2] + struct.pack(">BBH", 0xFF, kind, len(body) + 2) + body + data[2:]


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"comment": b"c"}, {"icc_profile": b"p" * 200}])
def test_the_size_of_a_plain_file_agrees_with_pillow(mode: str, options: dict[str, object]) -> None:
    data = jpeg(mode, (41, 30), **options)
    pillows = Image.open(io.BytesIO(data))
    assert plain_header(data) == (pillows.size, pillows.mode) == ((41, 30), mode)
    opened = open_image(data)
    assert (opened.width, opened.height, opened.format, opened.mode) == (41, 30, "JPEG", mode)
    # torchvision and Pillow each bundle a libjpeg; their rounding may differ by a level.
    np.testing.assert_allclose(opened.pixels().astype(int), decode(Image.open(io.BytesIO(data))), atol=2)


EXIF = Image.Exif()
EXIF[0x0112] = 6
UNUSUAL = {
    "several scans": jpeg(progressive=True),
    "turned": jpeg(exif=EXIF.tobytes()),
    "cmyk": jpeg("CMYK"),
    "Adobe's colors": with_segment(0xEE, b"Adobe" + bytes(7)),
    "several pictures": with_segment(0xE2, b"MPF\0" + bytes(20)),
    "XMP": with_segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x/>"),
    "a short JFIF": with_segment(0xE0, b"JFIF\0"),
    "a bad table": with_segment(0xDB, bytes([17]) + bytes(64)),
    "half a table": with_segment(0xDB, bytes(40)),
    "two frames": with_segment(0xC0, struct.pack(">BHHB", 8, 30, 40, 3) + bytes(9)),
    "twelve bits": with_segment(0xC0, struct.pack(">BHHB", 12, 30, 40, 3) + bytes(9)),
    "junk": jpeg()[:2] + b"junk" + jpeg()[2:],
    "another format": b"\x89PNG" + bytes(100),
    "nothing": b"",
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_other_files_are_left_to_pillow(name: str) -> None:
    assert plain_header(UNUSUAL[name]) is None


def told(data: bytes) -> object:
    pixels = decode(data)
    return pixels.reason if isinstance(pixels, BadImage) else (pixels.shape, pixels.tobytes())


def test_corrupt_files_give_the_same_result_as_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    data = jpeg(size=(16, 16), icc_profile=b"p" * 20, comment=b"c")
    header = data.index(b"\xff\xda") + 14
    broken = [data[:end] for end in range(0, len(data), 5)]
    broken += [data[:i] + bytes([b]) + data[i + 1 :] for i in range(header) for b in (0, 0xFF, data[i] ^ 1)]
    ours = [told(one) for one in broken]
    assert sum(plain_header(one) is not None for one in broken) > 100
    monkeypatch.setattr("dinocli.data.decode.image.plain_header", lambda data: None)
    assert [told(one) for one in broken] == ours


def test_the_limits_hold_for_plain_files_too() -> None:
    assert decode(jpeg(size=(400, 3))).reason == "too long: 400x3 pixels are over 100 to 1"
    assert decode(jpeg(size=(1, 3))).reason == "too small: 1x3 pixels are under 2 per side"


ALIKE = {
    "color": jpeg(subsampling=0),
    "grey": jpeg("L"),
    "turned": jpeg(subsampling=0, exif=EXIF.tobytes()),
    "with bytes after its end": jpeg(subsampling=0) + bytes(20),
}
NOT_ALIKE = {
    "half the colors": jpeg(subsampling=2),
    "half the columns of colors": jpeg(subsampling=1),
    "progressive": jpeg(subsampling=0, progressive=True),
    "cmyk": jpeg("CMYK"),
    "without an end": jpeg(subsampling=0)[:-2],
    "bands named R, G and B": jpeg(subsampling=0).replace(
        b"\x01\x11\x00\x02\x11\x01\x03\x11", b"R\x11\x00G\x11\x01B\x11"
    ),
    "no picture": b"\xff\xd8\xff\xd9",
}


@pytest.mark.parametrize("name", [*ALIKE, *NOT_ALIKE])
def test_only_files_that_every_decoder_decodes_alike_go_to_a_device(name: str) -> None:
    assert decodes_alike((ALIKE | NOT_ALIKE)[name]) == (name in ALIKE)


@pytest.mark.parametrize(
    ("data", "changes", "wanted"),
    [
        (jpeg(subsampling=0), {}, True),
        (jpeg(subsampling=0), {"reduce_above": 0.001}, False),
        (jpeg(subsampling=0), {"channels": 1}, False),
        (jpeg("CMYK"), {}, False),
        (with_segment(0xEE, b"Adobe" + bytes(7)), {}, False),
    ],
)
def test_a_device_gets_rgb_of_files_that_are_not_decoded_smaller(
    data: bytes, changes: dict[str, float], wanted: bool
) -> None:
    opened = open_image(data, DEFAULTS.model_copy(update=changes))
    assert opened.for_device == wanted
    assert not open_image(decode(data)).for_device, "pixels need no decoder"
