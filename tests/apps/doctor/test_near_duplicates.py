"""Near-duplicates: changed copies are found, other images are not."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from dinocli.apps.demo.drawings import draw
from dinocli.apps.doctor.near_duplicates import LIKENESS, is_flat, near_equal, thumbnail


def picture(index: int, size: int = 96) -> Image.Image:
    return Image.fromarray(np.asarray(draw(index, size=size).image))


def as_jpeg(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=40)
    return Image.open(file).convert("RGB")


@pytest.mark.parametrize(
    "change",
    [
        as_jpeg,
        lambda image: image.resize((48, 48)),
        lambda image: image.resize((200, 150)),
        lambda image: image.point(lambda v: v * 0.8),
        lambda image: image.crop((1, 1, 95, 95)),
    ],
    ids=["jpeg", "half", "stretched", "darker", "cropped"],
)
def test_a_changed_copy_is_found_and_no_other_image(change: object) -> None:
    pictures = [picture(i) for i in range(12)]
    again = change(pictures[5])  # type: ignore[operator]
    names = [*map(str, range(12)), "again"]
    count, pairs = near_equal(names, [thumbnail(np.asarray(p)) for p in [*pictures, again]])
    assert count == 1
    assert [(pair.first, pair.second) for pair in pairs] == [("5", "again")]
    assert LIKENESS < pairs[0].likeness <= 1.0001


def test_three_similar_images_count_as_two_duplicates_most_similar_pair_first() -> None:
    one, other = picture(0), picture(1)
    thumbs = [thumbnail(np.asarray(p)) for p in (one, other, one.crop((1, 1, 95, 95)), as_jpeg(one))]
    count, pairs = near_equal(["one", "other", "cropped", "jpeg"], thumbs)
    assert count == 2
    assert len(pairs) == 3
    assert (pairs[0].first, pairs[0].second) == ("one", "jpeg")


def test_images_of_one_color_are_skipped() -> None:
    generator = np.random.default_rng(0)
    flat = [np.full((32, 32, 3), 90, np.uint8) + generator.integers(0, 2, (32, 32, 3), np.uint8) for _ in range(3)]
    thumbs = [thumbnail(pixels) for pixels in flat]
    assert all(map(is_flat, thumbs))
    assert near_equal(["a", "b", "c"], thumbs) == (0, [])
    assert near_equal([], []) == (0, [])


def test_a_thumbnail_is_the_average_of_areas() -> None:
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:2, :2, 1] = 200
    thumb = thumbnail(pixels)
    assert thumb.shape == (8, 8, 3)
    assert thumb[0, 0].tolist() == [0, 200, 0]
    assert thumb.sum() == 200
    assert not is_flat(thumb)


def test_a_thumbnail_has_all_channels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 13), dtype=np.uint8)
    thumb = thumbnail(pixels)
    assert thumb.shape == (8, 8, 13)
    np.testing.assert_allclose(
        thumb, pixels.reshape(8, 8, 8, 8, 13).mean((1, 3)), atol=1.01
    )  # it rounds along each axis
    np.testing.assert_array_equal(thumbnail(np.ascontiguousarray(pixels[..., :3])), thumb[..., :3])
    assert thumbnail(pixels[..., :1]).shape == (8, 8, 1)
