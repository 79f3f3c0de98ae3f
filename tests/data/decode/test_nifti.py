"""Slices of NIfTI volumes: the values that the header's slope and intercept give, upright as in viewers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dinocli.data.decode.image import decode
from dinocli.data.decode.nifti import count_slices, open_slice
from dinocli.data.decode.raster import UnfitArray
from dinocli.data.images import ImagesConfig

nibabel: Any = pytest.importorskip("nibabel")
STORED = np.random.default_rng(0).integers(-1000, 1000, (20, 30, 4, 2), dtype=np.int16)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_a_slice_has_the_scaled_values_turned_upright(tmp_path: Path, name: str) -> None:
    volume = nibabel.Nifti1Image(STORED, np.eye(4))
    volume.header.set_slope_inter(2.0, -5.0)
    nibabel.save(volume, tmp_path / name)
    path = str(tmp_path / name)
    assert count_slices(path) == 8
    window = ImagesConfig(window=(-1500, 1500))
    for number, place in ((1, (0, 0)), (3, (2, 0)), (6, (1, 1))):
        units = STORED[:, :, *place] * 2.0 - 5
        shown = np.floor(np.clip((units + 1500) / 3000, 0, 1) * 255 + 0.5)
        # The first axis runs to the right and the second one upwards: row 0 is the end of the second axis.
        upright = np.array([[shown[x, 29 - row] for x in range(20)] for row in range(30)])
        np.testing.assert_allclose(decode(open_slice(path, number, 3), window), np.dstack([upright] * 3), atol=1)
    with pytest.raises(UnfitArray, match="no such page: 9; the file has pages 1 to 8"):
        open_slice(path, 9, 3)


def test_bytes_and_colors_are_unchanged(tmp_path: Path) -> None:
    grey = np.random.default_rng(1).integers(0, 255, (8, 9, 2), dtype=np.uint8)
    nibabel.save(nibabel.Nifti1Image(grey, np.eye(4)), tmp_path / "g.nii")
    one = ImagesConfig(channels=1)
    np.testing.assert_array_equal(
        decode(open_slice(str(tmp_path / "g.nii"), 2, 1), one)[..., 0], np.rot90(grey[..., 1])
    )  # type: ignore[index]
    colors = np.random.default_rng(2).integers(0, 255, (8, 9, 2, 3), dtype=np.uint8)
    records = colors.view([("R", "u1"), ("G", "u1"), ("B", "u1")])[..., 0]
    nibabel.save(nibabel.Nifti1Image(records, np.eye(4)), tmp_path / "c.nii")
    np.testing.assert_array_equal(decode(open_slice(str(tmp_path / "c.nii"), 1, 3)), np.rot90(colors[:, :, 0]))


def test_complex_values_and_other_channels_are_refused(tmp_path: Path) -> None:
    nibabel.save(nibabel.Nifti1Image(np.zeros((8, 9, 2), np.complex64), np.eye(4)), tmp_path / "z.nii")
    with pytest.raises(UnfitArray, match="no image: the volume holds complex64"):
        open_slice(str(tmp_path / "z.nii"), 1, 3)
    nibabel.save(nibabel.Nifti1Image(STORED, np.eye(4)), tmp_path / "a.nii")
    with pytest.raises(UnfitArray, match=r"other channels: 1 \(NIfTI\); expected 4"):
        open_slice(str(tmp_path / "a.nii"), 1, 4)
