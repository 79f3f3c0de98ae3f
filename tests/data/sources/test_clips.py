"""Pairs of frames: every other frame in reach has the same chance, and frames of other files have none."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import write_film, write_images

from dinocli.apps.pack import pack
from dinocli.core.errors import DinoError
from dinocli.data.images import ImagesConfig
from dinocli.data.sources.clips import Clips, clips_of
from dinocli.data.sources.indexed import Images
from dinocli.data.sources.listing import Names
from dinocli.data.sources.open import open_images, open_source, within
from dinocli.data.sources.several import open_sources
from dinocli.data.sources.shards import open_shards

# Two films, a photo between their frames, and frames that are not in the order of their times.
NAMES = [
    "a.mp4#time=0", "b.mp4#time=0.5", "a.mp4#time=2", "photo.jpg", "a.mp4#time=1", "b.mp4#time=0", "a.mp4#time=9.5",
    "b.mp4#time=1", "scan.tif#page=1", "b.mp4#time=1.51", "a.mp4#time=1", "scan.tif#page=2", "a.mp4#time=1,5",
]  # fmt: skip
REACHED = {0: {4, 10}, 1: {5, 7}, 2: {4, 10}, 4: {0, 2}, 5: {1, 7}, 7: {1, 5, 9}, 9: {7}, 10: {0, 2}}
SETTINGS = ImagesConfig(every=0.5, pair_within=0.5)


def drawn(clips: Clips, row: int, count: int = 600) -> Counter[int]:
    generator = np.random.default_rng(row)
    return Counter(clips.other(row, generator) for _ in range(count))


@pytest.mark.parametrize("copies", [1, 700])
def test_all_other_frames_in_reach_are_equally_probable_and_no_image_else_is_drawn(copies: int) -> None:
    before = [f"{i}.mp4#time={time}" for i in range(copies - 1) for time in (0, 1, 2)]
    clips, first = Clips(Names.of([*before, *NAMES]), 1.0), len(before)
    assert clips.frames == 10 - 1 + len(before)
    assert clips.alone == len(NAMES) - len(REACHED), "photos, pages, a frame far from the others and a wrong time"
    for row in range(len(NAMES)):
        found = drawn(clips, first + row)
        assert set(found) == {first + other for other in REACHED.get(row, {row})}
        assert min(found.values()) > 0.8 * 600 / len(found)


@pytest.mark.parametrize(("every", "count"), [(1 / 3, 3), (0.1, 3), (1 / 30, 7)])
def test_a_frame_exactly_as_far_away_as_allowed_is_in_reach(every: float, count: int) -> None:
    names = [f"a.mp4#time={round(number * every, 3):g}" for number in range(20)]
    clips = Clips(names, count * every)
    for row in range(20):
        assert set(drawn(clips, row)) == {other for other in range(20) if 0 < abs(other - row) <= count}


def test_images_without_frames_have_no_other() -> None:
    for names in ([], ["a.jpg", "b.tif#page=1"], ["a.mp4#time=1"], ["a.mp4#time=1"] * 3):
        clips = Clips(names, 5.0)
        assert clips.alone == len(names)
        assert [clips.other(row, np.random.default_rng(0)) for row in range(len(names))] == list(range(len(names)))


@pytest.fixture
def films(tmp_path: Path) -> Path:
    """Two folders with films of the same name, and photos in one of them."""
    for folder in ("x", "y"):
        write_film(tmp_path / folder / "f.mp4")
    write_images(tmp_path / "y", 2)
    return tmp_path


def read(*places: Path) -> Images:
    source = within(open_sources([os.fspath(place) for place in places]), SETTINGS)
    assert isinstance(source, Images)
    return source


def test_a_film_in_one_folder_has_no_pair_with_its_namesake_in_another(films: Path) -> None:
    source = read(films / "x", films / "y")
    assert [Path(name).name for name in source.names] == [
        *(f"f.mp4#time={time}" for time in ("0", "0.5", "1", "1.5")), "0000.png", "0001.png",
        *(f"f.mp4#time={time}" for time in ("0", "0.5", "1", "1.5")),
    ]  # fmt: skip
    clips = clips_of(source, 0.5)
    assert clips.alone == 2 and clips_of(source, 0.5) is clips, "built once per source"
    expected = {0: {1}, 1: {0, 2}, 3: {2}, 4: {4}, 6: {7}, 9: {8}}
    assert {row: set(drawn(clips, row, 50)) for row in expected} == expected


def test_images_that_were_taken_and_packed_keep_their_pairs(films: Path) -> None:
    source = read(films / "y")
    taken = source.take(np.array([5, 0, 3, 2]))
    assert [name.rpartition("=")[2] for name in taken.names] == ["1.5", "0000.png", "0.5", "0"]
    assert {row: set(drawn(clips_of(taken, 0.5), row, 50)) for row in range(4)} == {0: {0}, 1: {1}, 2: {3}, 3: {2}}
    pack(source, films / "pixels", pixels=True, images=SETTINGS)
    packed = open_images(str(films / "pixels"))
    assert list(packed.names) == list(source.names)
    assert within(packed, SETTINGS).notes == packed.notes, "nothing is ignored"
    assert set(drawn(clips_of(packed, 0.5), 3, 50)) == {2, 4}


def test_sources_without_pairs_are_refused_with_the_reason(films: Path) -> None:
    source = read(films / "y")
    with pytest.raises(
        DinoError, match=r"no image in .*y has another frame within 0\.3 seconds; 4 of 6 images are"
    ) as error:
        clips_of(source, 0.3)
    assert error.value.hint == "a larger images.pair_within, or --set images.pair_within=none"
    photos = within(open_source(str(write_images(films / "photos", 2))), SETTINGS)
    with pytest.raises(DinoError, match="0 of 2 images are frames of videos") as error:
        clips_of(photos, 0.5)
    assert error.value.hint == "name a folder or a list of videos, or --set images.pair_within=none"
    shutil.make_archive(str(films / "images-000000"), "tar", films / "photos")
    shards = within(open_shards(str(films / "images-000000.tar")), SETTINGS)
    assert "ignoring images.every=0.5, images.pair_within=0.5 for" in shards.notes[-1]
    with pytest.raises(DinoError, match="is read as a stream") as error:
        clips_of(shards, 0.5)
    assert "a folder or a list of videos" in error.value.hint
