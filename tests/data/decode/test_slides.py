"""Tiles of pyramids: the level's own pixels, also where the levels are no whole parts of each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dinocli.data.decode.image import decode
from dinocli.data.decode.raster import UnfitArray
from dinocli.data.decode.slides import count_levels, open_tile, tile_corners
from dinocli.data.images import ImagesConfig

pytest.importorskip("tiffslide")
tifffile: Any = pytest.importorskip("tifffile")
BASE = np.random.default_rng(0).integers(0, 255, (503, 751, 3), dtype=np.uint8)  # no multiples of the levels


@pytest.fixture
def pyramid(tmp_path: Path) -> str:
    with tifffile.TiffWriter(tmp_path / "p.tif") as writer:
        for step in (1, 2, 4):
            level = np.ascontiguousarray(BASE[::step, ::step])
            options = {"subifds": 2} if step == 1 else {"subfiletype": 1}
            writer.write(level, tile=(128, 128), photometric="rgb", metadata=None, **options)
    return str(tmp_path / "p.tif")


@pytest.mark.parametrize(("level", "step"), [(0, 1), (1, 2), (2, 4)])
def test_tiles_have_the_pixels_of_their_level(pyramid: str, level: int, step: int) -> None:
    pixels = BASE[::step, ::step]
    height, width, _ = pixels.shape
    corners = list(tile_corners(pyramid, 61, level))
    assert len(corners) == (height // 61) * (width // 61) and corners[1] == (61, 0)
    for x, y in [*corners[:3], corners[-1], (width - 61, height - 61)]:
        found = decode(open_tile(pyramid, (x, y), 61, level, 3))
        np.testing.assert_array_equal(found, pixels[y : y + 61, x : x + 61])


def test_what_lies_beyond_the_slide_is_refused(pyramid: str) -> None:
    assert count_levels(pyramid) == 3
    with pytest.raises(UnfitArray, match="no such tile: 700,0; level 0 has 751x503 pixels"):
        open_tile(pyramid, (700, 0), 64, 0, 3)
    with pytest.raises(UnfitArray, match="no such level: 3; the slide has levels 0 to 2"):
        list(tile_corners(pyramid, 64, 3))
    with pytest.raises(UnfitArray, match="too small: level 2 of 188x126 pixels"):
        list(tile_corners(pyramid, 400, 2))


def test_sixteen_bit_grey_keeps_its_depth(tmp_path: Path) -> None:
    values = np.random.default_rng(1).integers(0, 60000, (300, 200), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "g.tif", values, tile=(128, 128))
    window = ImagesConfig(channels=1, window=(0, 30000))
    found = decode(open_tile(str(tmp_path / "g.tif"), (100, 50), 64, 0, 1), window)
    expected = np.clip(values[50:114, 100:164] / 30000, 0, 1) * 255
    np.testing.assert_allclose(found[..., 0], expected, atol=1)  # type: ignore[index]
    assert count_levels(str(tmp_path / "g.tif")) == 1 and count_levels(__file__) == 1
