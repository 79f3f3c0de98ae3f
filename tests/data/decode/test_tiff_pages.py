"""Pages of TIFFs, cut out of their files: the pixels of tifffile and Pillow, in every layout that we read."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinocli.data.decode.image import decode
from dinocli.data.decode.raster import UnfitArray
from dinocli.data.decode.tiff_pages import Page, cut_page, open_planes, pages_of, plane_groups
from dinocli.data.images import ImagesConfig

tifffile: Any = pytest.importorskip("tifffile")
STACK = np.random.default_rng(0).integers(0, 60000, (5, 40, 56), dtype=np.uint16)
ALL = 1e9


def written(values: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, values, **options)
    return file.getvalue()


def first_values(data: bytes) -> Any:
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        return file.pages[0].asarray()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"metadata": None},
        {"byteorder": ">"},
        {"bigtiff": True},
        {"compression": "zlib", "predictor": True, "rowsperstrip": 7},
        {"tile": (16, 16)},
        {"imagej": True},
        {"imagej": True, "truncate": True},
    ],
    ids=str,
)
def test_every_page_has_the_values_that_were_written(options: dict[str, Any]) -> None:
    data = written(STACK, **options)
    pages = pages_of(data)
    assert len(pages) == len(STACK)
    for page, values in zip(pages, STACK, strict=True):
        one = cut_page(data, page, ALL)
        assert len(pages_of(one)) == 1 and len(one) < len(data)
        np.testing.assert_array_equal(first_values(one), values)
        np.testing.assert_array_equal(decode(one, ImagesConfig(channels=1))[..., 0], np.round(values / 65535 * 255))  # type: ignore[index]


def test_colored_pages_of_pillow_keep_their_palette_and_their_turn() -> None:
    pictures = [Image.fromarray(np.full((8, 12, 3), level, np.uint8)).quantize(4) for level in (50, 200)]
    file = io.BytesIO()
    pictures[0].save(file, "TIFF", save_all=True, append_images=pictures[1:], tiffinfo={274: 6})
    found = [decode(cut_page(file.getvalue(), page, ALL)) for page in pages_of(file.getvalue())]
    for pixels, picture in zip(found, pictures, strict=True):
        upright = np.rot90(picture.convert("RGB"), -1)
        np.testing.assert_allclose(pixels, upright, atol=1)  # Pillow stores palettes as 256ths, not 257ths


def test_thumbnails_are_no_pages() -> None:
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        for kind in (0, 1, 0, 1):
            writer.write(STACK[0], subfiletype=kind, metadata=None, photometric="minisblack")
    assert len(pages_of(file.getvalue())) == 2


def test_a_page_over_the_limit_and_a_corrupt_file_are_refused() -> None:
    data = written(STACK)
    with pytest.raises(UnfitArray, match=r"too large: a page of 0\.00448 megabytes, over 0\.001"):
        cut_page(data, pages_of(data)[0], 1000)
    assert pages_of(data[:9]) == [] and pages_of(b"II*\0") == []
    with pytest.raises(struct.error):
        cut_page(data, Page(len(data) + 5), ALL)


@pytest.mark.parametrize(
    ("axes", "options", "groups"),
    [
        ("ZCYX", {"imagej": True}, [[1, 2], [3, 4], [5, 6]]),
        ("CZYX", {"ome": True}, [[1, 4], [2, 5], [3, 6]]),
        ("QYX", {}, [[1, 2], [3, 4], [5, 6]]),
    ],
)
def test_planes_become_channels_by_the_axis_that_the_file_states(
    tmp_path: Path, axes: str, options: dict[str, Any], groups: list[list[int]]
) -> None:
    shape = [{"Z": 3, "C": 2, "Q": 6, "Y": 8, "X": 10}[axis] for axis in axes]
    values = np.random.default_rng(1).integers(0, 255, shape, dtype=np.uint8)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, values, metadata={"axes": axes} if options else None, **options)
    assert plane_groups(str(path), 2) == groups
    data, flat = path.read_bytes(), values.reshape(-1, 8, 10)
    for group in groups:
        planes = open_planes([cut_page(data, pages_of(data)[number - 1], ALL) for number in group], 2)
        pixels = decode(planes, ImagesConfig(channels=2))
        np.testing.assert_array_equal(pixels, flat[[number - 1 for number in group]].transpose(1, 2, 0))
    with pytest.raises(UnfitArray, match=r"other channels: \d planes; expected 4"):
        plane_groups(str(path), 4)


def test_planes_are_scaled_by_their_depth_or_the_window() -> None:
    values = STACK[:2]
    data = written(values, photometric="minisblack")
    pages = [cut_page(data, page, ALL) for page in pages_of(data)]
    expected = np.round(values / 65535 * 255).transpose(1, 2, 0)
    np.testing.assert_array_equal(decode(open_planes(pages, 2), ImagesConfig(channels=2)), expected)
    with pytest.raises(UnfitArray, match=r"other channels: 2 planes; expected 3 \(images.channels\)"):
        open_planes(pages, 3)
