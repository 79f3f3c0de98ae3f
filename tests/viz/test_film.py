from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinocli.viz.film import shown, small, write_gif, write_strip
from dinocli.viz.picture import Tile


def flat(red: int, height: int = 20, width: int = 30) -> np.ndarray:
    picture = np.zeros((height, width, 3), dtype=np.uint8)
    picture[..., 0] = red
    picture[:5, :7] = 255
    return picture


def test_a_gif_holds_every_frame_with_its_duration(tmp_path: Path) -> None:
    assert write_gif((flat(red) for red in (10, 10, 200)), tmp_path / "a.gif", 10) == 3
    with Image.open(tmp_path / "a.gif") as film:
        assert film.n_frames == 3, "equal frames are not merged"
        assert film.info["loop"] == 0
        for i, red in enumerate((10, 10, 200)):
            film.seek(i)
            assert film.info["duration"] == 100
            np.testing.assert_array_equal(np.asarray(film.convert("RGB")), flat(red))


def test_frames_are_written_without_collecting_them(tmp_path: Path) -> None:
    alive: list[int] = []

    class Counted(np.ndarray):
        def __del__(self) -> None:
            alive.append(-1)

    def coming() -> Iterator[np.ndarray]:
        for red in range(20):
            alive.append(1)
            assert sum(alive) <= 3
            yield flat(red).view(Counted)

    assert write_gif(coming(), tmp_path / "a.gif", 25) == 20


def test_no_frames_or_a_failure_leave_no_file(tmp_path: Path) -> None:
    assert write_gif([], tmp_path / "a.gif", 10) == 0

    def broken() -> Iterator[np.ndarray]:
        yield flat(1)
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        write_gif(broken(), tmp_path / "a.gif", 10)
    assert not list(tmp_path.iterdir())


def test_a_strip_shows_first_and_last_and_no_frame_twice(tmp_path: Path) -> None:
    assert shown(50) == [0, 7, 14, 21, 28, 35, 42, 49]
    assert shown(3) == [0, 1, 2] and shown(1) == [0] and shown(0) == []
    write_strip([Tile(flat(9, 60, 80), str(i)) for i in range(5)], tmp_path / "strip.png")
    with Image.open(tmp_path / "strip.png") as strip:
        assert 4 * 80 < strip.width < 5 * 80 and 2 * 60 < strip.height < 3 * 60


def test_small_keeps_the_aspect_ratio_and_never_enlarges() -> None:
    assert small(flat(1, 200, 400), 100).shape == (50, 100, 3)
    assert small(flat(1), 100).shape == (20, 30, 3)
