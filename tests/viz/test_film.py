from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinocli.data.decode.video import read_frame
from dinocli.data.images import DEFAULTS
from dinocli.viz.film import shown, small, write_gif, write_mp4, write_strip
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


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
@pytest.mark.parametrize("size", [(48, 64), (720, 1280)])
def test_an_mp4_is_shown_in_its_colors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], codec: str
) -> None:
    """The color matrix is the one that players assume, because MPEG-4 Part 2 cannot state it."""
    av = pytest.importorskip("av")
    monkeypatch.setattr(av, "codecs_available", {codec})
    color = (180, 60, 90)
    write_mp4([np.full((*size, 3), color, np.uint8)] * 2, tmp_path / "a.mp4", Fraction(10))
    with av.open(str(tmp_path / "a.mp4")) as file:
        luma = np.asarray(next(file.decode(video=0)).to_ndarray())[9, 9]
    red, blue = (0.2126, 0.0722) if size[0] == 720 else (0.299, 0.114)
    assert luma == pytest.approx(16 + 219 / 255 * (np.array(color) @ [red, 1 - red - blue, blue]), abs=2)
    np.testing.assert_allclose(np.asarray(read_frame(str(tmp_path / "a.mp4"), 0, DEFAULTS))[9, 9], color, atol=4)
