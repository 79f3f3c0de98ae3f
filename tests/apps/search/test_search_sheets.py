from __future__ import annotations

from pathlib import Path

import numpy as np
from conftest import write_stored
from PIL import Image

from dinocli.apps.search import sheets as gallery_pictures
from dinocli.apps.search.dedup import Group
from dinocli.apps.search.search import Hits, Neighbour
from dinocli.apps.search.sheets import draw_groups, draw_hits
from dinocli.features.gallery import open_gallery

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def count_squares(path: Path) -> dict[tuple[int, int, int], float]:
    """Count the squares of each color in a sheet."""
    page = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return {c: round((np.abs(page - c).max(-1) < 60).sum() / gallery_pictures._SIDE**2) for c in (RED, GREEN, BLUE)}


def data(folder: Path) -> Path:
    folder.mkdir()
    for name, color in (("r", RED), ("g", GREEN), ("b", BLUE)):
        Image.new("RGB", (50, 50), color).save(folder / f"{name}.png")
    return folder


def test_a_sheet_shows_the_query_and_its_neighbours(tmp_path: Path) -> None:
    images = data(tmp_path / "data")
    gallery = open_gallery(write_stored(tmp_path / "f", str(images), {"all": ["r.png", "g.png", "gone.png"]}))
    found = [Neighbour(gallery.name(row), 0.5, None, row) for row in (0, 2, 1)]
    [path], unread = draw_hits(gallery, [Hits(str(images / "b.png"), found)], tmp_path / "out" / "search.png")
    assert unread == {"gone.png": "missing: No such file or directory"}
    assert count_squares(path) == {RED: 1, GREEN: 1, BLUE: 1}
    many, _ = draw_hits(gallery, [Hits(str(images / "b.png"), found)] * 21, tmp_path / "many.jpg")
    assert [p.name for p in many] == ["many.jpg", "many-2.jpg"]
    assert [count_squares(p)[GREEN] for p in many] == [20, 1]
    assert Image.open(many[0]).format == "JPEG"


def test_a_sheet_shows_kept_and_dropped_images(tmp_path: Path) -> None:
    names = ["r.png", "g.png", "b.png"]
    gallery = open_gallery(write_stored(tmp_path / "f", str(data(tmp_path / "data")), {"all": names}))
    groups = [Group(0, [1], [0.9]), Group(2, [1] * 12, [0.95] * 12)]
    [path] = draw_groups(gallery, groups, tmp_path / "groups.png", pages=1)
    assert count_squares(path) == {RED: 1, GREEN: 11, BLUE: 1}
    assert draw_groups(gallery, groups, tmp_path / "none.png", pages=0) == []
    assert draw_groups(gallery, [], tmp_path / "none.png", pages=5) == []


def test_surplus_sheets_of_an_earlier_call_are_deleted(tmp_path: Path) -> None:
    gallery = open_gallery(
        write_stored(tmp_path / "f", str(data(tmp_path / "data")), {"all": ["r.png", "g.png", "b.png"]})
    )
    out = tmp_path / "groups.jpg"
    group = Group(0, [1], [0.9])
    assert len(draw_groups(gallery, [group] * 41, out, pages=5)) == 3
    (tmp_path / "groups-old.jpg").touch()
    assert [p.name for p in draw_groups(gallery, [group] * 21, out, pages=5)] == ["groups.jpg", "groups-2.jpg"]
    assert sorted(p.name for p in tmp_path.glob("groups*")) == ["groups-2.jpg", "groups-old.jpg", "groups.jpg"]
    assert draw_groups(gallery, [], out, pages=5) == []
    assert [p.name for p in tmp_path.glob("groups*")] == ["groups-old.jpg"]
