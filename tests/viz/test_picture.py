from __future__ import annotations

import numpy as np

from dinocli.viz.picture import (
    Tile,
    contact_sheet,
    fitted,
    heat,
    legend,
    outline,
    palette,
    sheet,
    spotlight,
    tinted,
    visible,
)


def test_heat_runs_from_black_to_yellow_at_the_photos_size() -> None:
    picture = heat(np.array([[0.0, 1.0], [0.25, 0.5]]), 40, 60)
    assert picture.shape == (40, 60, 3)
    assert picture[0, 0].sum() < 60
    assert picture[0, -1, 0] > 240
    assert picture[0, -1, 1] > 240
    assert heat(np.ones((2, 2)), 4, 4).sum() == heat(np.zeros((2, 2)), 4, 4).sum(), "a constant map is dark"


def test_heat_clips_values_beyond_the_given_scale() -> None:
    values = np.array([[0.0, 1.0], [2.0, 9.0]], dtype=np.float32)
    large = heat(values, 2, 2, (0.0, 2.0))
    assert np.array_equal(large[1, 0], large[1, 1]), "values above the scale are yellow"
    assert np.array_equal(heat(values[:1], 1, 2, (0.0, 2.0))[0], large[0]), "independent of other values"


def test_a_spotlight_keeps_the_inside_and_pales_the_outside() -> None:
    photo = np.full((4, 4, 3), (200, 10, 10), dtype=np.uint8)
    mask = np.zeros((4, 4), bool)
    mask[:2] = True
    lit = spotlight(photo, mask)
    assert (lit[:2] == photo[:2]).all()
    assert np.ptp(lit[2:].astype(int), axis=-1).max() == 0


def test_a_sheet_shows_its_tiles_completely() -> None:
    red, blue = (Tile(np.full((30, 50, 3), color, dtype=np.uint8), "name") for color in ((255, 0, 0), (0, 0, 255)))
    page = np.asarray(sheet([[red, blue], [None, red]]))
    assert (page == (255, 0, 0)).all(-1).sum() == 2 * 30 * 50
    assert (page == (0, 0, 255)).all(-1).sum() == 30 * 50


def test_visible_takes_the_first_channels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 13), dtype=np.uint8)
    for channels in (3, 4, 13):
        np.testing.assert_array_equal(visible(pixels[..., :channels]), pixels[..., :3])
    for channels in (1, 2):
        np.testing.assert_array_equal(visible(pixels[..., :channels]), pixels[..., [0, 0, 0]])


def test_a_contact_sheet_fits_photos_of_any_shape_into_its_squares() -> None:
    red, blue = (255, 0, 0), (0, 0, 255)
    wide = Tile(np.full((30, 60, 3), red, dtype=np.uint8), "a\nsecond line")
    high = Tile(np.full((800, 100, 3), blue, dtype=np.uint8), "of a path " * 20)
    page = np.asarray(contact_sheet([[wide, high], [None, wide, "gone"]], title="title " * 99, lead=1, side=80))
    assert (page == red).all(-1).sum() == 2 * 80 * 40
    assert (page == blue).all(-1).sum() == 80 * 10
    left = np.flatnonzero((page == red).all(-1).any(0))
    assert left[0] >= 6, "a margin"
    assert page.shape[1] > 3 * 80


def test_small_photos_are_enlarged_by_repetition_and_thin_ones_keep_a_pixel() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 4, 1), dtype=np.uint8)
    large = fitted(pixels, 64)
    assert large.shape == (64, 32, 3)
    np.testing.assert_array_equal(large[4::8, 4::8], pixels[..., [0, 0, 0]])
    assert fitted(np.zeros((1, 5000, 3), dtype=np.uint8), 64).shape == (1, 64, 3)


def test_an_outline_follows_the_inner_edge_of_a_mask() -> None:
    photo = np.full((40, 60, 3), (90, 160, 120), dtype=np.uint8)
    mask = np.zeros((40, 60), dtype=bool)
    mask[10:30, 20:60] = True
    drawn = outline(photo, mask)
    changed = (drawn != photo).any(-1)
    inner = np.zeros_like(mask)
    inner[12:28, 22:60] = True  # the photo's border is not an edge of the mask
    np.testing.assert_array_equal(changed, mask & ~inner)
    assert (drawn[10, 20:] == 255).all()
    np.testing.assert_array_equal(outline(photo, np.ones_like(mask)), photo)


def test_classes_have_distinct_colors_and_a_legend() -> None:
    colors = palette(20)
    assert len(np.unique(colors, axis=0)) == 20
    photo = np.zeros((100, 100, 3), dtype=np.uint8)
    classes = np.zeros((100, 100), dtype=np.uint8)
    classes[50:] = 3
    drawn = tinted(photo, classes, colors)
    np.testing.assert_array_equal(drawn[0, 0], (0.6 * colors[0]).round())
    np.testing.assert_array_equal(drawn[99, 0], (0.6 * colors[3]).round())
    named = legend(photo, [("sky", colors[1]), ("sea", colors[2])])
    for i in (1, 2):
        assert (named == colors[i]).all(-1).sum() >= 25
    assert not named[60:].any()
