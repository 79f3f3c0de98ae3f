"""Camera raw files: a DNG of a sensor's values, developed the same whatever else is in the picture."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dinocli.data.decode.image import decode, open_image
from dinocli.data.decode.pixels import BadImage
from dinocli.data.images import ImagesConfig

pytest.importorskip("rawpy")
tifffile: Any = pytest.importorskip("tifffile")
WHITE = 4095
IDENTITY = tuple(number for one in (1, 0, 0, 0, 1, 0, 0, 0, 1) for number in (one, 1))


def dng(sensor: NDArray[Any], orientation: int = 1) -> bytes:
    """Return a DNG of a Bayer sensor's values up to WHITE, with neutral white balance."""
    tags = [
        (50706, "B", 4, bytes([1, 4, 0, 0]), False),  # version
        (50707, "B", 4, bytes([1, 1, 0, 0]), False),
        (50708, "s", 0, "Test Camera", False),
        (33421, "H", 2, (2, 2), False),  # the pattern's size: red, green, green, blue
        (33422, "B", 4, bytes([0, 1, 1, 2]), False),
        (50714, "H", 1, 0, False),
        (50717, "H", 1, WHITE, False),
        (50721, "2i", 9, IDENTITY, False),  # color matrix
        (50728, "2I", 3, (1, 1) * 3, False),  # neutral color as shot
        (274, "H", 1, orientation, False),
        (271, "s", 0, "Test", False),
        (272, "s", 0, "Camera", False),
    ]
    file = io.BytesIO()
    tifffile.imwrite(file, sensor.astype(np.uint16), photometric=32803, extratags=tags, metadata=None)
    return file.getvalue()


def bt709(value: float) -> float:
    """Return the level of a share of white by the transfer function of BT.709, LibRaw's default."""
    return 255 * (4.5 * value if value < 0.018 else 1.099 * value**0.45 - 0.099)


@pytest.mark.parametrize("level", [0, 60, 1000, 2048, WHITE])
def test_a_flat_sensor_gives_its_own_level(level: int) -> None:
    pixels = decode(dng(np.full((64, 96), level)))
    assert isinstance(pixels, np.ndarray) and pixels.shape == (64, 96, 3)
    np.testing.assert_allclose(pixels, bt709(level / WHITE), atol=1)


def test_the_brightest_pixel_does_not_change_the_others() -> None:
    plain = np.full((64, 96), 1000)
    lamp = plain.copy()
    lamp[:, 60:] = 4000
    first, second = decode(dng(plain)), decode(dng(lamp))
    assert isinstance(first, np.ndarray) and isinstance(second, np.ndarray)
    np.testing.assert_array_equal(first[:, :50], second[:, :50])


@pytest.mark.parametrize(("orientation", "bright"), [(1, (5, 5)), (6, (5, -5)), (8, (-5, 5)), (3, (-5, -5))])
def test_a_picture_is_turned_once(orientation: int, bright: tuple[int, int]) -> None:
    sensor = np.zeros((64, 96))
    sensor[:32, :48] = 3000  # the upper left quarter, as stored
    opened = open_image(dng(sensor, orientation))
    assert not isinstance(opened, BadImage)
    assert (opened.height, opened.width) == ((96, 64) if orientation in (6, 8) else (64, 96))
    pixels = opened.pixels()
    assert isinstance(pixels, np.ndarray) and pixels.shape == (opened.height, opened.width, 3)
    levels = {place: int(pixels[place][1]) for place in ((5, 5), (5, -5), (-5, 5), (-5, -5))}
    assert max(levels, key=lambda place: levels[place]) == bright and sorted(levels.values())[:3] == [0, 0, 0]


def test_limits_channels_and_corrupt_files_are_reasons(capfd: pytest.CaptureFixture[str]) -> None:
    data = dng(np.full((64, 96), 1000))
    large = decode(data, ImagesConfig(max_megapixels=0.001))
    assert isinstance(large, BadImage) and large.reason.startswith("too large: 96x64 pixels")
    assert decode(data, ImagesConfig(channels=4)) == BadImage(
        "other channels: 3 (a camera's raw file); expected 4 (images.channels)"
    )
    grey = decode(data, ImagesConfig(channels=1))
    assert isinstance(grey, np.ndarray) and grey.shape == (64, 96, 1)
    assert isinstance(decode(data[:3000]), BadImage) and isinstance(decode(b"IIRO" + bytes(90)), BadImage)
    assert capfd.readouterr().err == "", "LibRaw prints to stderr itself"
