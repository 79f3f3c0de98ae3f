from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinocli.apps.attention import films as module
from dinocli.apps.attention.films import film
from dinocli.core.errors import DinoError
from dinocli.data.decode.image import decode
from dinocli.data.sources.frames import Frames, open_frames
from dinocli.evals.attention import attention_maps
from dinocli.features.encoder import Encoder
from dinocli.viz.picture import heat


def frames(folder: Path, count: int = 12, size: tuple[int, int] = (64, 32)) -> Frames:
    """Write frames of a bright square that moves right over noise."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for i in range(count):
        pixels = generator.integers(0, 90, (size[1], size[0], 3), dtype=np.uint8)
        pixels[8:24, 4 * i : 4 * i + 16] = 250
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return open_frames(folder)


def maps_of(encoder: Encoder, source: Frames, head: int | None = None) -> list[np.ndarray]:
    every = [attention_maps(encoder, decode(f.data), 32).heads for f in source.read(range(99))]
    return [heads.mean(0) if head is None else heads[head - 1] for heads in every]


def test_a_gif_shows_each_frame_beside_its_map_on_one_scale(tmp_path: Path, encoder: Encoder) -> None:
    source, path = frames(tmp_path / "f"), tmp_path / "out" / "f.gif"
    done = film(encoder, source, path, "gif", head=2, size=32)
    assert (done.frames, done.skipped) == (12, {})
    maps = maps_of(encoder, source, head=2)
    scale = (min(m.min() for m in maps), float(np.median([m.max() for m in maps])))
    with Image.open(path) as gif:
        assert (gif.n_frames, gif.size, gif.info["duration"], gif.info["loop"]) == (12, (128, 32), 40, 0)
        for i, (values, frame) in enumerate(zip(maps, source.read(range(99)), strict=True)):
            gif.seek(i)
            shown = np.asarray(gif.convert("RGB")).astype(int)
            assert np.abs(shown[:, 64:] - heat(values, 32, 64, scale)).mean() < 3
            assert np.abs(shown[:, :64] - decode(frame.data)).mean() < 12, "256 colors, most of them of the photo"


def test_equal_maps_are_drawn_equally(tmp_path: Path, encoder: Encoder) -> None:
    for i, value in enumerate((0, 0, 255)):
        Image.new("RGB", (64, 32), (value,) * 3).save(tmp_path / f"{i}.png")
    maps = maps_of(encoder, open_frames(tmp_path))
    film(encoder, open_frames(tmp_path), tmp_path / "x.gif", "gif", size=32, rate=Fraction(4))
    shown = []
    with Image.open(tmp_path / "x.gif") as gif:
        for i in range(3):
            gif.seek(i)
            assert gif.info["duration"] == 250
            shown.append(np.asarray(gif.convert("RGB"))[:, 64:])
    assert np.array_equal(maps[0], maps[1]) and not np.array_equal(maps[0], maps[2])
    assert np.array_equal(shown[0], shown[1]) and not np.array_equal(shown[0], shown[2])


def test_a_strip_reads_and_shows_only_eight_frames(tmp_path: Path, encoder: Encoder) -> None:
    source = frames(tmp_path / "f", 12)
    (tmp_path / "f" / "1.png").unlink()
    done = film(encoder, source, tmp_path / "f.png", "strip", size=32)
    assert (done.frames, done.skipped) == (8, {}), "the missing second frame is not among the eight"
    with Image.open(tmp_path / "f.png") as strip:
        assert strip.width > 8 * 64
    assert film(encoder, frames(tmp_path / "g", 3), tmp_path / "g.png", "strip", size=32).frames == 3


def test_an_mp4_reads_back_as_a_video(tmp_path: Path, encoder: Encoder) -> None:
    pytest.importorskip("av")
    source, path = frames(tmp_path / "f", size=(63, 33)), tmp_path / "f.mp4"
    assert film(encoder, source, path, "mp4", size=32, rate=Fraction(12)).frames == 12
    video = open_frames(path)
    assert (video.count, video.rate) == (12, 12)
    again = film(encoder, video, tmp_path / "again.gif", "gif", size=32)
    with Image.open(again.path) as gif:
        assert gif.n_frames == 12
        assert gif.info["duration"] == 80, "the video's own rate"


def test_unreadable_frames_and_other_sizes_are_skipped_and_reported(tmp_path: Path, encoder: Encoder) -> None:
    source = frames(tmp_path / "f", 4)
    (tmp_path / "f" / "1.png").write_bytes(b"no image")
    Image.new("RGB", (20, 20)).save(tmp_path / "f" / "2.png")
    done = film(encoder, source, tmp_path / "f.gif", "gif", size=32)
    assert done.frames == 2
    assert done.skipped["1.png"].startswith("not an image")
    assert done.skipped["2.png"] == "other size: 20x20; the first frame has 64x32"
    with Image.open(tmp_path / "f.gif") as gif:
        assert gif.n_frames == 2


def test_an_error_leaves_no_file(tmp_path: Path, encoder: Encoder) -> None:
    source = frames(tmp_path / "f", 2)
    with pytest.raises(DinoError, match="--head 3 is larger than the 2 heads") as caught:
        film(encoder, source, tmp_path / "f.gif", "gif", head=3, size=32)
    assert caught.value.hint == "use --head 2 or fewer"
    for i in range(2):
        (tmp_path / "f" / f"{i}.png").write_bytes(b"no image")
    with pytest.raises(DinoError, match=r"none of the frames of .*; 0\.png: not an image"):
        film(encoder, source, tmp_path / "f.gif", "gif", size=32)
    assert not list(tmp_path.glob("*.gif")) and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("form", ["gif", "mp4"])
def test_frames_are_drawn_one_after_another(
    tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    if form == "mp4":
        pytest.importorskip("av")
    alive, most = [0], [0]

    @dataclass
    class Drawn:
        name: str
        photo: np.ndarray
        map: np.ndarray

        def __post_init__(self) -> None:
            alive[0] += 1
            most[0] = max(most[0], alive[0])

        def __del__(self) -> None:
            alive[0] -= 1

    monkeypatch.setattr(module, "_Drawn", Drawn)
    drawn: Iterator[object] = frames(tmp_path / "f")
    assert film(encoder, drawn, tmp_path / f"f.{form}", form, size=32).frames == 12
    assert most[0] <= 2, "independent of the length of the film"
