from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinocli.data.decode.pixels import BadImage
from dinocli.data.sources.label_maps import LabelMap, read_labels, write_labels

VALUES = np.array([[0, 1, 1], [0, 7, 255]], dtype=np.uint8)


def test_numbers_and_palette_survive_a_round_trip(tmp_path: Path) -> None:
    palette = bytes(range(256)) * 3
    write_labels(tmp_path / "a.png", LabelMap(VALUES, palette))
    read = read_labels(tmp_path / "a.png")
    np.testing.assert_array_equal(read.values, VALUES)
    assert read.palette == palette
    assert read.objects == [1, 7]
    assert read.void.tolist() == [[False, False, False], [False, False, True]], "255 in a palette, as in DAVIS 2017"
    assert read.cleared.values.tolist() == [[0, 1, 1], [0, 7, 0]]
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == "P"


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_grey_masks_are_label_maps_however_they_were_saved(tmp_path: Path, mode: str) -> None:
    Image.fromarray(VALUES).convert(mode).save(tmp_path / "a.png")
    read = read_labels(tmp_path / "a.png")
    np.testing.assert_array_equal(read.values, VALUES)
    assert read.palette is None
    assert read.objects == [1, 7, 255] and not read.void.any()
    write_labels(tmp_path / "b.png", read)
    with Image.open(tmp_path / "b.png") as image:
        assert image.mode == "L"


def test_black_and_white_is_one_object(tmp_path: Path) -> None:
    Image.fromarray(VALUES > 1).save(tmp_path / "a.png")
    assert read_labels(tmp_path / "a.png").objects == [255]


def test_files_that_are_no_label_map_give_a_reason(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (30, 30, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "photo.png")
    Image.fromarray(noise[..., 0]).save(tmp_path / "grey.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    for name, why in (("photo", "its pixels are RGB"), ("grey", "values, like a photo"), ("broken", "damaged")):
        found = read_labels(tmp_path / f"{name}.png")
        assert isinstance(found, BadImage) and why in found.reason


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_deep_values_are_kept_or_refused_and_never_clipped(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(VALUES.astype(np.uint16)).save(path)
    read = read_labels(path)
    np.testing.assert_array_equal(read.values, VALUES)
    assert read.values.dtype == np.uint8 and read.objects == [1, 7, 255]
    for large in (256, 300, 65535):
        Image.fromarray(np.where(VALUES == 7, large, VALUES.astype(np.int64)).astype(np.uint16)).save(path)
        assert read_labels(path) == BadImage(
            f"no label map: it holds the value {large}; expected object numbers from 0 to 255"
        )


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_values_of_32_bits_are_kept_or_refused(tmp_path: Path, kind: type) -> None:
    path = tmp_path / "a.tif"
    Image.fromarray(VALUES.astype(kind)).save(path)
    np.testing.assert_array_equal(read_labels(path).values, VALUES)
    for odd in (-1, 256, 1e6, *((0.5, np.nan, np.inf) if kind is np.float32 else ())):
        Image.fromarray(np.where(VALUES == 7, odd, VALUES.astype(np.float64)).astype(kind)).save(path)
        bad = read_labels(path)
        assert isinstance(bad, BadImage) and f"the value {kind(odd).item()};" in bad.reason


@pytest.mark.parametrize(("name", "form"), [("JPEG", {}), ("JPEG", {"quality": 100}), ("WEBP", {}), ("JPEG2000", {})])
def test_a_lossy_format_is_refused_by_its_name(tmp_path: Path, name: str, form: dict) -> None:
    from PIL import features

    if name == "JPEG2000" and not features.check("jpg_2000"):
        pytest.skip("this Pillow reads no JPEG 2000")
    disk = np.zeros((64, 64), np.uint8)
    disk[16:48, 20:44] = 255
    path = tmp_path / "a.png"  # the suffix does not matter
    Image.fromarray(disk).save(path, name, **form)
    bad = read_labels(path)
    assert isinstance(bad, BadImage) and bad.reason.endswith("changes values; save the mask as PNG")
    assert bad.reason.split()[3].lower() == name.lower().removesuffix("2000")


def test_lossless_webp_is_exact(tmp_path: Path) -> None:
    Image.fromarray(VALUES).save(tmp_path / "a.webp", lossless=True)
    np.testing.assert_array_equal(read_labels(tmp_path / "a.webp").values, VALUES)


def test_alpha_that_hides_objects_is_refused_and_other_alpha_ignored(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    for mode in ("LA", "RGBA"):
        image = Image.fromarray(VALUES).convert(mode)
        image.putalpha(Image.fromarray(np.where(VALUES > 0, np.uint8(255), np.uint8(0))))
        image.save(path)
        np.testing.assert_array_equal(read_labels(path).values, VALUES)
        image.putalpha(Image.fromarray(np.where(VALUES == 7, np.uint8(100), np.uint8(255))))
        image.save(path)
        bad = read_labels(path)
        assert isinstance(bad, BadImage) and "1 of its pixels are transparent and not 0" in bad.reason
    # Transparent white: without alpha, all of it would be one object.
    image = Image.new("RGBA", (4, 4), (255, 255, 255, 0))
    image.save(path)
    assert isinstance(read_labels(path), BadImage)


def test_transparency_of_a_palette_or_of_one_grey_changes_no_number(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    image = Image.fromarray(VALUES)
    image.save(path, transparency=7)
    np.testing.assert_array_equal(read_labels(path).values, VALUES)
    image.putpalette(bytes(range(256)) * 3)
    image.save(path, transparency=0)
    np.testing.assert_array_equal(read_labels(path).values, VALUES)


def png16(bands: np.ndarray) -> bytes:
    """Return a 16-bit PNG with two to four bands, which Pillow cannot write. [H, W, S]"""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, count = bands.shape
    head = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[count], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in bands)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("bands", [2, 3, 4])
def test_colors_of_16_bits_are_refused(tmp_path: Path, bands: int) -> None:
    values = np.repeat(VALUES[..., None].astype(np.uint16), bands, axis=2)
    values[..., 3:] = 65535
    (tmp_path / "a.png").write_bytes(png16(values))
    bad = read_labels(tmp_path / "a.png")
    assert isinstance(bad, BadImage) and "16 bits" in bad.reason, "Pillow keeps only the upper 8 bits, which are 0"


def test_a_pgm_with_its_own_maximum_keeps_its_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.pgm"
    for data in (b"P5 3 1 10\n" + bytes([0, 1, 10]), b"P2 3 1 10\n0 1 10\n"):
        path.write_bytes(data)
        assert read_labels(path).values.tolist() == [[0, 1, 10]]
    path.write_bytes(b"P5 3 1 300\n" + np.array([0, 1, 200], ">u2").tobytes())
    assert read_labels(path).values.tolist() == [[0, 1, 200]]
    path.write_bytes(b"P5 3 1 300\n" + np.array([0, 1, 300], ">u2").tobytes())
    assert "the value 300;" in read_labels(path).reason


def test_the_orientation_of_a_mask_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(VALUES).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_labels(tmp_path / "a.png").values, np.rot90(VALUES, -1))


def test_tiffs_of_any_layout_keep_their_numbers(tmp_path: Path) -> None:
    tifffile, path = pytest.importorskip("tifffile"), tmp_path / "a.tif"
    pytest.importorskip("imagecodecs")
    colors = np.random.default_rng(0).integers(0, 65535, (3, 256), dtype=np.uint16)
    for compression in (None, "lzw", "deflate", "packbits", "zstd"):
        for kind in (np.uint8, np.uint16, np.uint32, np.int16, np.float64):
            tifffile.imwrite(path, VALUES.astype(kind), compression=compression)
            np.testing.assert_array_equal(read_labels(path).values, VALUES, err_msg=f"{compression} {kind}")
        tifffile.imwrite(path, VALUES, photometric="palette", colormap=colors, compression=compression)
        read = read_labels(path)
        np.testing.assert_array_equal(read.values, VALUES)
        assert read.palette == (colors.T // 257).astype(np.uint8).tobytes()
    tifffile.imwrite(path, VALUES[None].repeat(3, 0), photometric="rgb", planarconfig="separate")
    np.testing.assert_array_equal(read_labels(path).values, VALUES)
    tifffile.imwrite(path, 255 - VALUES, photometric="miniswhite")
    np.testing.assert_array_equal(read_labels(path).values, VALUES)
    tifffile.imwrite(path, np.kron(VALUES, np.ones((16, 16), np.uint8)), compression="jpeg")
    assert "JPEG" in read_labels(path).reason
