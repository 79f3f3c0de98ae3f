"""DICOM: right values by the standard's own formulas, computed here from the stored ones."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from medical_files import dicom
from numpy.typing import NDArray
from PIL import Image

from dinocli.data.decode.image import decode, open_image
from dinocli.data.decode.pixels import BadImage
from dinocli.data.images import ImagesConfig

pydicom: Any = pytest.importorskip("pydicom", minversion="3")
STORED = np.arange(32 * 24, dtype=np.uint16).reshape(32, 24) * 4
CT = {"RescaleSlope": "2", "RescaleIntercept": "-1024"}
LOSSLESS_JPEG = "1.2.840.10008.1.2.4.70"


def shown(values: NDArray[Any], low: float, high: float) -> NDArray[Any]:
    """Return a grey picture as three channels, black at `low` and white at `high`."""
    return np.dstack([np.floor(np.clip((values.astype(float) - low) / (high - low), 0, 1) * 255 + 0.5)] * 3)


def test_values_are_rescaled_before_the_window_of_the_preset() -> None:
    units = STORED * 2.0 - 1024
    found = decode(dicom(STORED, **CT), ImagesConfig(window=(-1000, 400)))
    np.testing.assert_allclose(found, shown(units, -1000, 400), atol=1)
    grey = decode(dicom(STORED, **CT), ImagesConfig(window=(-1000, 400), channels=1))
    np.testing.assert_allclose(grey, shown(units, -1000, 400)[..., :1], atol=1)


def test_the_window_of_the_file_is_the_default() -> None:
    units = STORED * 2.0 - 1024
    data = dicom(STORED, WindowCenter=["40", "9000"], WindowWidth=["400", "1"], **CT)
    # PS3.3 C.11.2.1.2.1: black below c - 0.5 - (w - 1) / 2, white above c - 0.5 + (w - 1) / 2.
    np.testing.assert_allclose(decode(data), shown(units, 40 - 0.5 - 399 / 2, 40 - 0.5 + 399 / 2), atol=1)
    exact = dicom(STORED, WindowCenter="40", WindowWidth="400", VOILUTFunction="LINEAR_EXACT", **CT)
    np.testing.assert_allclose(decode(exact), shown(units, -160, 240), atol=1)


def test_percentiles_are_the_window_of_last_resort() -> None:
    low, high = np.percentile(STORED, (1, 99))
    np.testing.assert_allclose(decode(dicom(STORED)), shown(STORED, low, high), atol=1)
    padded = STORED.astype(np.int16)
    padded[:8] = -2000
    low, high = np.percentile(padded[8:], (1, 99))
    found = decode(dicom(padded, PixelPaddingValue=-2000))
    np.testing.assert_allclose(found, shown(padded, low, high), atol=1)


def test_monochrome1_is_inverted() -> None:
    data = dicom(STORED, "MONOCHROME1", WindowCenter="1000.5", WindowWidth="1001")
    np.testing.assert_allclose(decode(data), 255 - shown(STORED, 500, 1500), atol=1)
    bytes_ = (STORED // 16).astype(np.uint8)
    np.testing.assert_array_equal(decode(dicom(bytes_, "MONOCHROME1")), 255 - np.dstack([bytes_] * 3))


def test_ybr_is_converted_once_whatever_the_tag_says() -> None:
    colors = np.random.default_rng(0).integers(0, 255, (32, 24, 3), dtype=np.uint8)
    np.testing.assert_array_equal(decode(dicom(colors, "RGB")), colors)
    stored = np.asarray(Image.fromarray(colors).convert("YCbCr"))
    np.testing.assert_allclose(decode(dicom(stored, "YBR_FULL")), colors, atol=4)


def test_every_frame_has_its_own_values_and_scale() -> None:
    from pydicom.dataset import Dataset

    from dinocli.data.decode.dicom import open_dicom

    def group(slope: str) -> Any:
        scale, outer = Dataset(), Dataset()
        scale.RescaleSlope, scale.RescaleIntercept = slope, "0"
        outer.PixelValueTransformationSequence = [scale]
        return outer

    frames = np.stack([STORED, STORED + 1])
    data = dicom(frames, frames=2, PerFrameFunctionalGroupsSequence=[group("1"), group("3")])
    opened = open_image(data)
    assert not isinstance(opened, BadImage) and opened.pages == 2
    wide = ImagesConfig(window=(0, 9000))
    second = open_dicom(data, wide, 2)
    assert second is not None
    np.testing.assert_allclose(decode(second, wide), shown((STORED + 1) * 3.0, 0, 9000), atol=1)
    np.testing.assert_allclose(decode(data, wide), shown(STORED, 0, 9000), atol=1)


def test_changed_values_of_one_reading_are_not_those_of_the_next() -> None:
    """pydicom's `pixel_array` is one array for all who read it."""
    from dinocli.data.decode.dicom import open_dicom

    data = dicom(STORED)
    for _ in range(2):
        opened = open_dicom(data, ImagesConfig())
        assert opened is not None
        values = opened.read()
        np.testing.assert_array_equal(values[..., 0], STORED)
        values[:] = 0


def test_lossless_jpeg_is_unpacked() -> None:
    codecs = pytest.importorskip("imagecodecs")
    pytest.importorskip("gdcm")
    from pydicom.encaps import encapsulate

    data = dicom(STORED, syntax=LOSSLESS_JPEG, PixelData=encapsulate([codecs.ljpeg_encode(STORED)]))
    np.testing.assert_allclose(decode(data, ImagesConfig(window=(0, 3000))), shown(STORED, 0, 3000), atol=1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"PixelData": None, "Modality": "SR"}, "no image: DICOM without pixels (SR)"),
        ({"Rows": 1}, "too small: 24x1 pixels are under 2 per side"),
        ({"Rows": 40000, "Columns": 40000}, "too large: 40000x40000 pixels are over 150 megapixels"),
    ],
)
def test_files_that_are_no_pictures_have_a_reason(change: dict[str, Any], reason: str) -> None:
    file = pydicom.dcmread(io.BytesIO(dicom(STORED)))
    for key, value in change.items():
        if value is None:
            delattr(file, key)
        else:
            setattr(file, key, value)
    data = io.BytesIO()
    file.save_as(data, enforce_file_format=True)
    assert decode(data.getvalue()) == BadImage(reason)


def test_a_file_that_is_cut_short_is_a_reason() -> None:
    assert isinstance(decode(dicom(STORED)[:-500]), BadImage)
    assert decode(dicom(STORED), ImagesConfig(channels=4)) == BadImage(
        "other channels: 1 (DICOM); expected 4 (images.channels)"
    )
