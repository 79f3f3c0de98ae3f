"""Values of mask files; the tests of label maps and masks cover their interpretation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinocli.data.decode import mask_values
from dinocli.data.decode.mask_values import read_values
from dinocli.data.decode.pixels import BadImage

VALUES = np.array([[0, 1, 1], [0, 300, 65535]], dtype=np.uint16)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("with_tifffile", [True, False])
def test_stored_values_are_returned(tmp_path: Path, suffix: str, with_tifffile: bool, monkeypatch) -> None:
    if not with_tifffile:
        monkeypatch.setattr(mask_values, "_tifffile", lambda: None)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(VALUES).save(path)
    np.testing.assert_array_equal(read_values(path).values, VALUES)
    Image.fromarray(VALUES > 1).save(path)
    np.testing.assert_array_equal(read_values(path).values, (VALUES > 1) * 255)
    assert (read_values(path).palette, read_values(path).lossy) == (None, "")


def test_formats_that_change_values_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for form, name in (("JPEG", "JPEG"), ("WEBP", "WebP"), ("PNG", ""), ("BMP", ""), ("GIF", "")):
        Image.new("L", (8, 8), 200).save(path, form)
        assert read_values(path).lossy == name


def test_corrupt_files_never_raise(tmp_path: Path) -> None:
    path = tmp_path / "a"
    Image.fromarray(VALUES).save(path, "TIFF")
    whole = path.read_bytes()
    for data in (b"", b"x", whole[:4], whole[:40], whole[:-8], b"II*\0" + bytes(40), b"\x89PNG\r\n\x1a\n" + bytes(99)):
        path.write_bytes(data)
        read = read_values(path)
        assert isinstance(read, BadImage) or data == whole[:-8], data
