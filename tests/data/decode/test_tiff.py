"""TIFFs: the full grid of layouts against tifffile, and refused files."""

from __future__ import annotations

import io
import struct
import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinocli.data.decode.image import decode, open_image
from dinocli.data.decode.pixels import BadImage
from dinocli.data.decode.tiff import Facts, open_tiff
from dinocli.data.images import ImagesConfig

tifffile = pytest.importorskip("tifffile")
pytest.importorskip("imagecodecs")

SIDE = 21, 34
FULL = {"u1": 255, "u2": 65535, "u4": 2**32 - 1, "i1": 128, "i2": 32768, "i4": 2**31, "f2": 1, "f4": 1, "f8": 1}


def ramp(bands: int, kind: str, top: float | None = None) -> np.ndarray:
    """Return values over the full range of a dtype, with a different pattern per band. [H, W, bands]"""
    y, x = np.mgrid[: SIDE[0], : SIDE[1]]
    part = np.stack([(x * (3 + 2 * b) + y * (7 - b)) % 101 for b in range(bands)], -1) / 100
    top = FULL[kind] if top is None else top
    if kind[0] == "i":
        return np.clip(part * 2 * top - top, -top, top - 1).astype(kind)
    return (part * top).astype(kind)


def written(values: np.ndarray, photometric: str = "minisblack", **options: Any) -> bytes:
    file = io.BytesIO()
    planes = options.get("planarconfig") == "separate"
    values = np.ascontiguousarray(values.transpose(2, 0, 1) if planes else values)
    if values.shape[0 if planes else -1] == 1:
        values = values[0] if planes else values[..., 0]
        options["planarconfig"] = None
    tifffile.imwrite(file, values, photometric=photometric, **options)
    return file.getvalue()


def stored(data: bytes) -> np.ndarray:
    """Return the values that tifffile reads. [H, W, bands]"""
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages[0]
        values = page.asarray()
    if values.ndim == 2:
        return values[..., None]
    return values.transpose(1, 2, 0) if page.axes == "SYX" else values


def scaled(values: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.clip((values.astype(float) - low) * (255 / (high - low)), 0, 255)


def span(kind: str) -> tuple[float, float]:
    return (-FULL[kind] if kind[0] == "i" else 0, FULL[kind])


def check(data: bytes, wanted: np.ndarray, channels: int, label: object, levels: float = 0.51, **images: Any) -> None:
    """Check decoded pixels. A tolerance of 0.51 levels allows rounding to 8 bits; 1.01 also Pillow's own rounding."""
    seen = decode(data, ImagesConfig(channels=channels, **images))
    assert not isinstance(seen, BadImage), (label, seen)
    assert seen.shape == (*wanted.shape[:2], channels), (label, seen.shape)
    assert np.abs(seen - wanted).max() <= levels, (label, np.abs(seen - wanted).max())


def reason(data: bytes, channels: int = 3) -> str:
    bad = decode(data, ImagesConfig(channels=channels))
    assert isinstance(bad, BadImage), bad.shape
    return bad.reason


@pytest.mark.parametrize("kind", FULL)
def test_every_layout_gives_the_values_of_tifffile(kind: str) -> None:
    pieces: list[dict[str, Any]] = [{}, {"tile": (16, 16)}, {"rowsperstrip": 5}]
    packings = [(None, False), ("deflate", True), ("lzw", False), ("packbits", False), ("zstd", True)]
    count = 0
    for bands in (1, 2, 3, 4, 13):
        values = ramp(bands, kind)
        for photometric in ("minisblack", "rgb") if bands in (3, 4) else ("minisblack",):
            for planar in ("contig", "separate"):
                for packing, predictor in packings:
                    # Cycle through byte orders and pieces: each occurs with each packing, in two seconds overall.
                    order, big, piece = "<>"[count % 2], count % 3 == 0, pieces[count % 5 % 3]
                    count += 1
                    if predictor and kind == "u4" and packing == "zstd":
                        predictor = False
                    extra = ["unspecified"] * (bands - (3 if photometric == "rgb" else 1))
                    options = {"extrasamples": extra} if extra else {}
                    data = written(
                        values, photometric, planarconfig=planar, compression=packing, predictor=predictor,
                        byteorder=order, bigtiff=big, **piece, **options,
                    )  # fmt: skip
                    label = bands, photometric, planar, packing, order, big, piece
                    there = stored(data)
                    assert np.array_equal(there, values)
                    wanted = values if kind == "u1" else scaled(values, *span(kind))
                    check(data, wanted, bands, label)
                    if bands == 3 or (bands == 4 and photometric == "rgb"):
                        colors = values[..., :3]
                        check(data, colors if kind == "u1" else scaled(colors, *span(kind)), 3, label)
                    elif bands == 1:
                        check(data, np.repeat(wanted, 3, -1), 3, label)
                    else:
                        assert reason(data).startswith(f"other channels: {bands}"), label
                    if kind != "u1" and count % 2:
                        low, high = span(kind)[0] * 0.3, span(kind)[1] * 0.6
                        check(data, scaled(values, low, high), bands, label, window=(low, high))


@pytest.mark.parametrize("bits", [1, 2, 4, 12])
@pytest.mark.parametrize("order", ["<", ">"])
def test_unusual_depths_fill_the_range(bits: int, order: str) -> None:
    top = 2**bits - 1
    values = np.uint16(np.indices(SIDE).sum(0) % (top + 1))[..., None]
    values = values.astype(bool) if bits == 1 else values if bits > 8 else values.astype(np.uint8)
    for photometric in ("minisblack", "miniswhite"):
        for options in ({}, {"rowsperstrip": 3}, {"tile": (16, 16)}):
            try:
                data = written(values, photometric, bitspersample=bits, byteorder=order, **options)
            except NotImplementedError as error:
                pytest.skip(f"imagecodecs of 2024 reads these depths and does not write them: {error}")
            wanted = scaled(stored(data), 0, top)  # tifffile writes 12 bits in the wrong order if big-endian
            check(data, np.repeat(wanted if photometric == "minisblack" else 255 - wanted, 3, -1), 3, options)
    if bits == 12:
        check(data, 255 - scaled(stored(data), 500, 2500), 1, bits, window=(500, 2500))


@pytest.mark.parametrize("kind", ["u1", "u2", "u4", "f4"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("packing", [None, "deflate"])
def test_white_as_zero_is_inverted(kind: str, order: str, packing: str | None) -> None:
    values = ramp(1, kind)
    data = written(values, "miniswhite", byteorder=order, compression=packing)
    check(data, 255 - scaled(values, *span(kind)), 1, kind)
    if kind != "u1":
        window = span(kind)[1] * 0.2, span(kind)[1] * 0.7
        check(data, 255 - scaled(values, *window), 1, kind, window=window)
    several = written(ramp(3, kind), "miniswhite", extrasamples=["unspecified"] * 2, byteorder=order)
    assert reason(several).startswith("not read here: a TIFF of 3 bands of")


@pytest.mark.parametrize("wide", [True, False], ids=["16-bit map", "8-bit map"])
@pytest.mark.parametrize(
    "options", [{}, {"compression": "deflate"}, {"tile": (16, 16)}, {"byteorder": ">", "bigtiff": True}]
)
def test_a_color_map_of_16_bits_or_8_gives_its_colors(wide: bool, options: dict[str, Any]) -> None:
    colors = np.random.default_rng(0).integers(0, 256, (3, 256))
    values = ramp(1, "u1")
    data = written(values, "palette", colormap=np.uint16(colors * (257 if wide else 1)), **options)
    wanted = colors.T[values[..., 0]]
    check(data, wanted, 3, options, 0)
    gray = np.asarray(Image.fromarray(np.uint8(wanted)).convert("L"))[..., None]
    check(data, gray, 1, options, 0)
    assert reason(data, 4).startswith("other channels: ")


def test_a_color_map_of_65536_colors() -> None:
    colors = np.random.default_rng(0).integers(0, 65536, (3, 65536), dtype=np.uint16)
    values = ramp(1, "u2")
    wanted = scaled(colors.T[values[..., 0]], 0, 65535)
    check(written(values, "palette", colormap=colors), wanted, 3, "16-bit index")


@pytest.mark.parametrize("kind", ["u1", "u2", "f4"])
@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_alpha_is_composited_on_white(kind: str, planar: str, order: str) -> None:
    top = span(kind)[1]
    for bands, photometric in ((4, "rgb"), (2, "minisblack")):
        values = ramp(bands, kind)
        opacity = values[..., -1:] / top
        for extra in ("unassalpha", "assocalpha"):
            if extra == "assocalpha":
                values = np.concatenate([(values[..., :-1] * opacity).astype(kind), values[..., -1:]], -1)
            data = written(values, photometric, extrasamples=[extra], planarconfig=planar, byteorder=order)
            colors = scaled(values[..., :-1], 0, top)
            ink = colors if extra == "assocalpha" else colors * opacity
            wanted = ink + 255 * (1 - opacity)
            check(data, np.repeat(wanted, 3, -1) if bands == 2 else wanted, 3, (bands, extra), 1.01)
            check(data, values if kind == "u1" else scaled(values, 0, top), bands, (bands, extra, "as it is"))
            if kind == "u2" and extra == "unassalpha":
                wanted = scaled(values[..., :-1], 20_000, 50_000) * opacity + 255 * (1 - opacity)
                wanted = np.repeat(wanted, 3, -1) if bands == 2 else wanted
                check(data, wanted, 3, bands, window=(20_000, 50_000))


@pytest.mark.parametrize("kind", ["u1", "u2"])
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_cmyk_and_ycbcr_become_rgb(kind: str, planar: str) -> None:
    top = span(kind)[1]
    inks = ramp(4, kind)
    light = 1 - inks / top
    data = written(inks, "separated", planarconfig=planar)
    check(data, 255 * light[..., :3] * light[..., 3:], 3, "CMYK", 1.01)
    assert reason(data, 4) == "other channels: 4 (CMYK); expected 4 (images.channels)"
    luma = ramp(3, kind)
    y, blue, red = (luma[..., i] * (255 / top) - (127.5 + 0.5 / (top + 1) * 255 if i else 0) for i in range(3))
    wanted = np.stack([y + 1.402 * red, y - 0.344136 * blue - 0.714136 * red, y + 1.772 * blue], -1)
    for options in ({}, {"compression": "deflate"}, {"tile": (16, 16)}):
        data = written(luma, "ycbcr", planarconfig=planar, **options)
        check(data, np.clip(wanted, 0, 255), 3, options, 1.01)


@pytest.mark.parametrize("packing", ["jpeg", "jpeg2000", "png", "webp", "lerc"])
@pytest.mark.parametrize("bands", [1, 3])
def test_tiffs_with_jpeg_png_or_other_images_as_pieces(packing: str, bands: int) -> None:
    photometric = "rgb" if bands == 3 else "minisblack"
    if packing == "webp" and bands == 1:
        pytest.skip("WebP has three bands")
    exact = {"webp": {"lossless": True}, "jpeg": {"level": 95}}.get(packing, {})
    for options in ({}, {"tile": (16, 16)}, {"tile": (16, 16), "byteorder": ">", "bigtiff": True}):
        data = written(ramp(bands, "u1"), photometric, compression=packing, compressionargs=exact, **options)
        there = stored(data)
        check(data, there, bands, options, 1.01 if packing == "jpeg" else 0)  # two decoders of JPEG


def test_four_bands_of_jpeg_in_planes() -> None:
    data = written(ramp(4, "u1"), compression="jpeg", planarconfig="separate", extrasamples=["unspecified"] * 3)
    check(data, stored(data), 4, "planes", 1.01)


def edited(data: bytes, tag: int, value: int, *, to: int | None = None) -> bytes:
    """Return a little-endian TIFF with the value of a one-number tag changed, or the tag replaced by `to`."""
    (at,) = struct.unpack_from("<I", data, 4)
    (entries,) = struct.unpack_from("<H", data, at)
    changed = bytearray(data)
    for entry in range(at + 2, at + 2 + 12 * entries, 12):
        number, kind = struct.unpack_from("<HH", data, entry)
        if number == tag:
            struct.pack_into("<H", changed, entry, to or tag)
            struct.pack_into("<H" if kind == 3 else "<I", changed, entry + 8, value)
            return bytes(changed)
    raise AssertionError(f"no tag {tag}")


def test_a_missing_sample_format_means_unsigned() -> None:
    for kind in ("u1", "u2", "u4"):
        values = ramp(1, kind)
        signed = written(values.view(kind.replace("u", "i")), "minisblack")  # writes the tag
        check(edited(signed, 339, 1), scaled(values, *span(kind)), 1, kind)
        bare = written(values, "minisblack")
        assert 339 not in [tag.code for tag in tifffile.TiffFile(io.BytesIO(bare)).pages[0].tags]
        check(bare, scaled(values, *span(kind)), 1, kind)


@pytest.mark.parametrize("fill", [0, 90])
@pytest.mark.parametrize("kind", ["u1", "u2"])
@pytest.mark.parametrize("bands", [1, 3])
def test_sparse_tiles_are_empty(kind: str, bands: int, fill: int) -> None:
    values = ramp(bands, kind)
    nodata = [(42113, 2, 3, f"{fill}", True)] if fill else []  # as GDAL writes it
    photometric = "rgb" if bands == 3 else "minisblack"
    data = bytearray(written(values, photometric, tile=(16, 16), extratags=nodata))
    with tifffile.TiffFile(io.BytesIO(bytes(data))) as file:
        tags = file.pages[0].tags
        for tag in (tags[324], tags[325]):
            form = "<I" if tag.dtype == 4 else "<H"
            struct.pack_into(form, data, tag.valueoffset + struct.calcsize(form), 0)  # the second tile
    wanted = values.copy()
    wanted[:16, 16:32] = fill
    assert np.array_equal(stored(bytes(data)), wanted)
    check(bytes(data), np.repeat(scaled(wanted, *span(kind)), 3 // bands, -1), 3, kind)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["u1", "u2", "f4"])
def test_an_orientation_is_applied_on_both_routes(orientation: int, kind: str) -> None:
    values = ramp(3, kind)
    turns = {2: lambda p: p[:, ::-1], 3: lambda p: p[::-1, ::-1], 4: lambda p: p[::-1], 5: lambda p: p.swapaxes(0, 1)}
    turns |= {6: lambda p: np.rot90(p, -1), 7: lambda p: np.rot90(p, 2).swapaxes(0, 1), 8: np.rot90, 1: lambda p: p}
    for planar in ("contig", "separate"):
        data = written(values, "rgb", planarconfig=planar, extratags=[(274, 3, 1, orientation, True)])
        wanted = turns[orientation](scaled(values, *span(kind)))
        opened = open_image(data)
        assert (opened.height, opened.width) == wanted.shape[:2]
        check(data, wanted, 3, (orientation, planar))


def test_pages_are_counted_without_smaller_versions() -> None:
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as out:
        out.write(ramp(3, "u1"), photometric="rgb")
        out.write(ramp(3, "u1")[::2, ::2], photometric="rgb", subfiletype=1)
        out.write(ramp(3, "u1"), photometric="rgb")
        out.write(ramp(1, "u2")[..., 0])
    assert open_image(file.getvalue()).pages == 3
    assert open_image(written(ramp(1, "f4"))).pages == 1


def test_plain_files_are_left_to_pillow() -> None:
    for bands, photometric in ((1, "minisblack"), (3, "rgb")):
        assert isinstance(open_tiff(written(ramp(bands, "u1"), photometric), 3), Facts)
    assert isinstance(open_tiff(written(ramp(1, "u2")), 3), Facts)
    assert open_tiff(b"\xff\xd8\xff", 3) is None
    assert open_tiff(b"II*\0", 3) is None


def test_packed_depths_written_by_libtiff_are_correct() -> None:
    imagecodecs = pytest.importorskip("imagecodecs")
    values = np.uint8(np.indices((24, 32)).sum(0) % 16)
    packed = values[:, ::2] << 4 | values[:, 1::2]
    for packing in ("lzw", "deflate", "packbits", None):
        data = edited(edited(written(packed[..., None], compression=packing), 256, 32), 258, 4)
        check(data, np.repeat(values[..., None] * 17, 3, -1), 3, packing, 0)
    assert imagecodecs


def test_the_reason_names_the_layout_and_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = written(ramp(3, "u1"), "rgb")
    deep = written(ramp(3, "u2"), "rgb", planarconfig="separate")
    monkeypatch.setitem(sys.modules, "tifffile", None)
    assert decode(plain).shape == (*SIDE, 3)
    wanted = (
        "not read here: a TIFF of 3 bands of 16 bits in planes, RGB, compression 1 needs pip install 'dinocli[tiff]'"
    )
    assert reason(deep) == wanted


def test_unsupported_layouts_are_named() -> None:
    assert "photometric 32845" in reason(edited(written(ramp(3, "u2"), "rgb"), 262, 32845))
    assert reason(edited(written(ramp(1, "u1")), 259, 34676)).startswith("not read here: a TIFF of 1 band of 8 bits")
    raw = written(ramp(3, "u1"), "rgb", extratags=[(50706, 1, 4, (1, 4, 0, 0), True)])
    assert reason(raw).startswith("not read here: a camera's raw file")


def test_truncated_files_and_pieces_of_the_wrong_size_are_refused() -> None:
    data = written(ramp(3, "u2"), "rgb", planarconfig="separate")
    assert reason(data[:-100]).startswith("truncated: ")
    tiles = written(ramp(5, "u1"), compression="jpeg", planarconfig="separate", tile=(16, 16), extrasamples=[0] * 4)
    frame = tiles.index(b"\xff\xc0")
    lying = tiles[: frame + 5] + struct.pack(">HH", 60000, 60000) + tiles[frame + 9 :]
    assert reason(lying, 5).startswith("damaged: a piece of 60000x60000 pixels")
    huge = edited(edited(written(ramp(1, "u1"), tile=(16, 16), compression="zstd"), 323, 60_000), 322, 60_000)
    assert reason(huge) == "too large: tiles of 60000x60000 pixels in a TIFF of 34x21"
