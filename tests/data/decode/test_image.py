from __future__ import annotations

import io
import random
import re
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinocli.data.decode.image import decode, open_image
from dinocli.data.decode.pixels import BadImage
from dinocli.data.images import ImagesConfig

NASTY = Path(__file__).parents[4] / "shared/data/nasty.tar.gz"
CATEGORIES = {
    "other channels",  # a grey TIFF with a second band of unspecified meaning
    "not an image",
    "not read here",
    "truncated",
    "too large",
    "too long",
    "too small",
    "too slow",
    "damaged",
    "empty",
}
RAMP = np.tile(np.linspace(0, 1, 32), (16, 1))
DEEP = np.uint16(RAMP * 65535)


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def photo(height: int = 75, width: int = 101) -> Image.Image:
    """Return an image of smooth colors with edges and some noise."""
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(0).integers(0, 20, (height, width, 3))
    bands = np.stack([x * 2, y * 3, ((x // 9 + y // 7) % 2) * 200], -1)
    return Image.fromarray(np.uint8(np.clip(bands + noise, 0, 255)))


def tiff(values: np.ndarray, **tags: tuple[int, int, int]) -> bytes:
    """Return an uncompressed single-strip TIFF of little-endian grey; each of `tags` is (number, type, value)."""
    height, width = values.shape
    body = values.astype(values.dtype.newbyteorder("<")).tobytes()
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    entries = {
        256: (4, width),
        257: (4, height),
        258: (3, values.itemsize * 8),
        259: (3, 1),
        262: (3, 1),
        273: (4, 8),
        277: (3, 1),
        278: (4, height),
        279: (4, len(body)),
        339: (3, kind),
    }
    entries |= {number: (type_, value) for number, type_, value in tags.values()}
    rows = b"".join(struct.pack("<HHII", n, t, 1, v) for n, (t, v) in sorted(entries.items()))
    return b"II*\0" + struct.pack("<I", 8 + len(body)) + body + struct.pack("<H", len(entries)) + rows + bytes(4)


def png(*chunks: tuple[bytes, bytes], width: int = 8, height: int = 8) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunk(*c) for c in chunks) + chunk(b"IEND", b"")


def reason(data: bytes | Image.Image, **images: object) -> str:
    bad = decode(data, ImagesConfig(**images))
    assert isinstance(bad, BadImage), bad.shape
    assert bad.reason.split(":")[0] in CATEGORIES
    assert bad.reason.isprintable()
    return bad.reason


JPEGS = {
    "444": saved(photo(), "JPEG", subsampling=0),
    "422": saved(photo(), "JPEG", subsampling=1),
    "420": saved(photo(), "JPEG", subsampling=2),
    "progressive": saved(photo(), "JPEG", progressive=True),
    "grey": saved(photo().convert("L"), "JPEG"),
    "rgb": saved(photo(), "JPEG", keep_rgb=True),
    "cmyk": saved(photo().convert("CMYK"), "JPEG"),
    "restarts": saved(photo(), "JPEG", restart_marker_blocks=2),
    "mpo": saved(photo(), "MPO", save_all=True, append_images=[photo(30, 40)]),
}


@pytest.mark.parametrize("kind", ["BMP", "GIF", "ICO", "JPEG2000", "PCX", "PPM", "QOI", "SGI", "TGA", "TIFF", "WEBP"])
def test_formats(kind: str) -> None:
    pixels = decode(saved(photo(64, 64), kind))
    assert np.abs(pixels.astype(int) - np.asarray(photo(64, 64))).mean() < 25


@pytest.mark.parametrize(
    "data",
    [
        saved(Image.fromarray(DEEP)),
        saved(Image.fromarray(DEEP), "TIFF"),
        saved(Image.fromarray(DEEP), "PPM"),
        tiff(DEEP >> 4, highest=(281, 3, 4095)),
        tiff(DEEP >> 4, highest=(281, 3, 3900)),  # the largest value of the image, which implies 12 bits
        tiff(DEEP, highest=(281, 3, 255)),  # a wrong maximum
        tiff(65535 - DEEP, photometric=(262, 3, 0)),  # white is zero
        tiff(np.uint32(RAMP * (2**32 - 1))),
        tiff(np.int32(RAMP * 65535)),
        tiff(np.int16(RAMP * 65535 - 32768)),
        tiff(np.float32(RAMP)),
        tiff(np.float32(RAMP * 2 - 1)),
        saved(Image.fromarray(np.float32(RAMP * 255)), "TIFF", compression="tiff_lzw"),
    ],
    ids="png16 tiff16 pgm16 12bit 12bit-of-image wrong-highest white-is-zero uint32 int32 int16 float signed float255".split(),
)
def test_deep_grey_is_scaled_and_neither_white_nor_black(data: bytes) -> None:
    np.testing.assert_allclose(decode(data)[..., 0], RAMP * 255, atol=1.5)


def test_deep_colors_are_scaled() -> None:
    pixels = np.repeat(DEEP[..., None], 3, -1).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    data = png((b"IDAT", zlib.compress(rows)), width=32, height=16).replace(
        struct.pack(">IIBB", 32, 16, 8, 0), struct.pack(">IIBB", 32, 16, 16, 2)
    )
    header = data[12:29]
    data = data[:29] + struct.pack(">I", zlib.crc32(header)) + data[33:]
    np.testing.assert_allclose(decode(data), np.repeat(RAMP[..., None], 3, -1) * 255, atol=1.5)


@pytest.mark.parametrize(
    "values", [np.uint16(RAMP * 1000 + 200), np.int32(RAMP * 1000 + 200), np.float32(RAMP * 1000 + 200)]
)
def test_a_window_sets_the_black_and_white_values(values: np.ndarray) -> None:
    pixels = decode(tiff(values), ImagesConfig(window=(450, 950)))
    np.testing.assert_allclose(pixels[..., 0], np.clip(RAMP * 2 - 0.5, 0, 1) * 255, atol=1.5)


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf, -3.4e38])
@pytest.mark.parametrize("scale", [1.0, 1.3, 255.0, 4000.0])
def test_floats_with_missing_values_and_an_unusual_range_keep_contrast(odd: float, scale: float) -> None:
    values = np.float32(RAMP * scale)
    values[3, 4] = odd
    pixels = decode(tiff(values))[..., 0]
    assert pixels.max() - pixels.min() > 12
    assert (np.diff(np.delete(pixels, 3, 0).astype(int), axis=1) >= 0).all()


def test_floats_without_any_number_are_damaged() -> None:
    assert reason(tiff(np.full((4, 4), np.nan, np.float32))).startswith("damaged: ")


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame_of_an_animation(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    first = decode(saved(frames[0], kind, save_all=True, append_images=frames[1:]))[0, 0]
    assert np.abs(first.astype(int) - [255, 0, 0]).max() < 5


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_pages_and_frames_are_counted(kind: str, count: int) -> None:
    frames = [photo(30, 40 + i).resize((40, 30)) for i in range(count)]
    options = {"save_all": True, "append_images": frames[1:]} if count > 1 else {}
    assert open_image(saved(frames[0], kind, **options)).pages == count


def test_a_preview_in_a_photo_does_not_count_as_a_page() -> None:
    assert open_image(JPEGS["mpo"]).pages == open_image(JPEGS["420"]).pages == open_image(photo()).pages == 1


@pytest.mark.parametrize("kind", ["bands in one row", "tiles of 16"])
def test_a_bilevel_scan_is_not_too_slow(kind: str) -> None:
    tifffile = pytest.importorskip("tifffile")
    scan = np.indices((1400, 1000)).sum(0) % 7 < 3
    file, pieces = io.BytesIO(), {"tile": (16, 16)} if kind == "tiles of 16" else {"rowsperstrip": 1}
    tifffile.imwrite(file, scan, photometric="minisblack", **pieces)
    assert np.array_equal(decode(file.getvalue())[..., 0] > 0, scan)
    for packing in ("group4", "group3"):
        data = saved(Image.fromarray(scan), "TIFF", compression=packing, tiffinfo={278: 1})
        assert np.array_equal(decode(data)[..., 0] > 0, scan)


def test_avif_of_ten_bits_is_named_under_a_window() -> None:
    imagecodecs = pytest.importorskip("imagecodecs")
    if "AVIF" not in Image.OPEN:
        pytest.skip("this Pillow reads no AVIF")
    values = np.full((16, 16, 3), 700, np.uint16)
    data = imagecodecs.avif_encode(values, level=100, bitspersample=10)
    assert np.abs(decode(data).astype(int) - round(700 * 255 / 1023)).max() <= 3  # lossy
    assert reason(data, window=(0, 1023)).startswith("not read here: AVIF of more than 8 bits")


@pytest.mark.parametrize("reduce", [1, 2, 4, 8])
def test_jpegs_can_be_decoded_smaller(reduce: int) -> None:
    opened = open_image(JPEGS["420"])
    small = opened.pixels(reduce)
    assert small.shape == (-(-75 // reduce), -(-101 // reduce), 3)
    wanted = np.asarray(photo().resize((small.shape[1], small.shape[0]), Image.Resampling.BOX))
    assert np.abs(small.astype(int) - wanted).mean() < 20
    assert opened.pixels().shape == (75, 101, 3)  # and again
    assert open_image(saved(photo())).pixels(reduce).shape == (75, 101, 3)


def test_a_pillow_image_is_accepted_and_unchanged() -> None:
    given = Image.open(io.BytesIO(JPEGS["420"]))
    assert open_image(given).pixels(8).shape == (75, 101, 3)
    np.testing.assert_array_equal(decode(given), decode(given))
    assert given.size == (101, 75)
    assert decode(photo().convert("LA")).shape == (75, 101, 3)
    assert reason(Image.new("L", (1, 1))).startswith("too small: ")


@pytest.mark.parametrize("data", [b"not an image", bytes(1000), b"\xff\xd8\xff", b"GIF89a", b"II*\0", b"MM\0+", b"BM"])
def test_files_that_are_no_image_give_a_reason(data: bytes) -> None:
    assert re.match("not an image|damaged|truncated|too", reason(data))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "PPM", "TIFF"])
def test_truncated_files_can_be_accepted_with_the_missing_part_grey(kind: str) -> None:
    data = saved(photo(), kind)
    data = data[: len(data) * 2 // 3]
    assert kind == "TIFF" or reason(data).startswith("truncated: ")
    if kind == "TIFF":  # the directory of a TIFF may come last
        return
    pixels = decode(data, ImagesConfig(truncated=True))
    top, bottom = (pixels[5:30], pixels[-5:]) if kind != "BMP" else (pixels[-30:-5], pixels[:5])  # stored upside down
    assert np.abs(bottom.astype(int) - 128).max() <= 3
    assert top.std() > 30
    assert reason(saved(photo(), "PNG")[:60], truncated=True)


@pytest.mark.parametrize(
    "data",
    [
        png((b"IDAT", b""), width=60000, height=60000),
        b"GIF89a" + struct.pack("<HH", 60000, 60000) + bytes(30),
        b"P6 60000 60000 255\n",
        b"RIFF\x64\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0\xff\x3f\0\xff\x3f\0" + bytes(60),
        saved(photo(16, 16), "ICO").replace(struct.pack(">II", 16, 16), struct.pack(">II", 60000, 60000)),
    ],
    ids=["png", "gif", "ppm", "webp", "ico"],
)
def test_bombs_are_refused(data: bytes) -> None:
    assert isinstance(decode(data), BadImage)


def test_files_crafted_to_be_slow_are_refused() -> None:
    jpeg = JPEGS["progressive"]
    last = jpeg.rfind(b"\xff\xda")
    many = tiff(np.zeros((8, 8), np.uint8), strips=(273, 4, 8)).replace(
        struct.pack("<HHI", 273, 4, 1), struct.pack("<HHI", 273, 4, 600_000)
    )
    busy = {
        "scans": jpeg[:-2] + jpeg[last:-2] * 5000 + jpeg[-2:],
        "segments": jpeg[:2] + b"\xff\xe1\0\x0eExif\0\0II*\0xx" * 100_000 + jpeg[2:],
        "junk": jpeg[:20] + bytes(200_000) + jpeg[20:],
        "chunks": png(*[(b"tEXt", b"a\0b")] * 50_000, (b"IDAT", b"")),
        "strips": many + bytes(700_000),
    }
    for name, data in busy.items():
        assert reason(data).startswith("too slow: "), name


def test_corrupt_files_never_raise() -> None:
    # A few truncated and changed files per format; thousands more were tried when this was written.
    small = photo(24, 32)
    kinds = "JPEG PNG GIF TIFF BMP WEBP PPM TGA ICO PCX DDS SGI QOI JPEG2000 MPO".split()
    files = [saved(small, kind) for kind in kinds]
    files += [saved(small, "TIFF", compression=c) for c in ("tiff_lzw", "tiff_deflate", "jpeg")]
    files += [JPEGS["progressive"], JPEGS["cmyk"], saved(Image.fromarray(DEEP)), tiff(DEEP), tiff(np.float32(RAMP))]
    pick = random.Random(0)
    for data in files:
        for i in range(40):
            changed = bytearray(data[: pick.randrange(len(data))] if i % 4 == 0 else data)
            for _ in range(min(len(changed), pick.randrange(4))):
                changed[pick.randrange(min(len(changed), pick.choice((64, 10**6))))] = pick.choice((0, 255, 127, 1))
            pixels = decode(bytes(changed), ImagesConfig(max_megapixels=4, truncated=i % 2 == 0))
            if isinstance(pixels, BadImage):
                assert pixels.reason.split(":")[0] in CATEGORIES
                assert "object at" not in pixels.reason
            else:
                assert pixels.dtype == np.uint8
                assert pixels.shape[2:] == (3,)


@pytest.mark.skipif(not NASTY.exists(), reason="the nasty files are only where this was developed")
def test_the_nasty_files() -> None:
    with tarfile.open(NASTY) as tar:
        files = {m.name.split("/")[-1]: tar.extractfile(m).read() for m in tar if m.isfile()}
    results = {
        name: decode(data, ImagesConfig(max_megapixels=20))
        for name, data in files.items()
        if not name.endswith((".tsv", ".md"))
    }
    taken = {name: pixels for name, pixels in results.items() if isinstance(pixels, np.ndarray)}
    assert len(results) > 200
    assert len(taken) >= 86
    assert all(r.reason.split(":")[0] in CATEGORIES for r in results.values() if isinstance(r, BadImage))
    turned = [pixels for name, pixels in sorted(taken.items()) if name.startswith("exif-orientation")]
    assert {t.shape for t in turned} == {turned[0].shape}
    assert max(np.abs(t.astype(int) - turned[0]).mean() for t in turned) < 12


def test_a_large_qoi_is_refused_because_pillow_is_slow() -> None:
    data = b"qoif" + struct.pack(">IIBB", 2000, 1500, 3, 0) + bytes(100)
    assert decode(data).reason.startswith("too slow: 2000x1500")


def test_a_grey_file_accepts_a_window_per_channel() -> None:
    windows = ((0, 65535), (0, 30_000), (20_000, 65535))
    pixels = decode(tiff(DEEP), ImagesConfig(window=windows))
    for i, window in enumerate(windows):
        assert np.array_equal(pixels[..., i], decode(tiff(DEEP), ImagesConfig(window=window))[..., 0])
