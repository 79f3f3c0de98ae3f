from __future__ import annotations

import struct
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from conftest import write_images
from PIL import Image

from dinocli.core.errors import DinoError
from dinocli.data.decode.image import decode
from dinocli.data.decode.pixels import BadImage
from dinocli.data.sources.frames import Frames, is_video, open_frames

GREYS = [20, 90, 160, 230]


def write_video(path: Path, greys: list[int] = GREYS, form: str = "mp4") -> Path:
    """Write a video at 10 frames per second; each frame is one grey, with its left half black."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w", format=form) as file:
        stream = file.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        for grey in greys:
            pixels = np.full((32, 64, 3), grey, dtype=np.uint8)
            pixels[:, :32] = 0
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode())
    return path


def test_frames_are_sorted_by_number(tmp_path: Path) -> None:
    for name in ("f_10.png", "f_9.png", "f_1.png", "a.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    frames = open_frames(tmp_path)
    assert [frame.name for frame in frames.read(range(9))] == ["a.png", "f_1.png", "f_9.png", "f_10.png"]
    assert (frames.count, frames.rate) == (4, None)
    assert [(frame.number, frame.name) for frame in frames.read({3, 1})] == [(1, "f_1.png"), (3, "f_10.png")]


def test_a_removed_frame_gives_a_reason(tmp_path: Path) -> None:
    (frame,) = Frames(tmp_path, [tmp_path / "gone.png"]).read(range(9))
    assert frame.data == BadImage("cannot be opened: No such file or directory")


def test_one_folder_is_one_film(tmp_path: Path) -> None:
    write_images(tmp_path / "dog" / "frames", 2)
    with pytest.raises(DinoError, match="has subfolders of frames") as caught:
        open_frames(tmp_path)
    assert caught.value.hint.endswith("dog/frames")


@pytest.mark.parametrize("form", ["mp4", "mpegts"])
def test_a_video_yields_its_frames_on_every_pass(tmp_path: Path, form: str) -> None:
    video = open_frames(write_video(tmp_path / "x.mp4", form=form))
    assert (video.count, video.rate) == (4, Fraction(10)), "a transport stream states no count, so packets are counted"
    for _ in range(2):
        found = list(video.read(range(9)))
        assert [frame.name for frame in found] == ["frame 1", "frame 2", "frame 3", "frame 4"]
        for frame, grey in zip(found, GREYS, strict=True):
            pixels = decode(frame.data)
            assert pixels.shape == (32, 64, 3)
            assert abs(int(pixels[16, 48, 0]) - grey) < 8 and pixels[16, 16, 0] < 8
    assert [frame.number for frame in video.read({2})] == [2]


@pytest.mark.parametrize(
    ("matrix", "corners"),
    [  # a, b, c, d of the display matrix, and the greys at the top left, top right, bottom left and bottom right
        ((1, 0, 0, 1), (240, 160, 80, 0)),
        ((-1, 0, 0, 1), (160, 240, 0, 80)),
        ((-1, 0, 0, -1), (0, 80, 160, 240)),
        ((1, 0, 0, -1), (80, 0, 240, 160)),
        ((0, 1, 1, 0), (240, 80, 160, 0)),
        ((0, 1, -1, 0), (80, 240, 0, 160)),
        ((0, -1, -1, 0), (0, 160, 80, 240)),
        ((0, -1, 1, 0), (160, 0, 240, 80)),
    ],
)
def test_the_display_matrix_of_a_video_is_applied(tmp_path: Path, matrix: tuple, corners: tuple) -> None:
    av = pytest.importorskip("av")
    path = tmp_path / "x.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        pixels = np.kron(np.array([[240, 160], [80, 0]], np.uint8), np.ones((16, 32), np.uint8))
        file.mux(stream.encode(av.VideoFrame.from_ndarray(np.dstack([pixels] * 3), format="rgb24")))
        file.mux(stream.encode())
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44  # the track's matrix of nine numbers, behind times, duration and volume
    a, b, c, d = (65536 * number for number in matrix)
    assert struct.unpack_from(">9i", data, at) == (65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    struct.pack_into(">9i", data, at, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    (frame,) = open_frames(path).read(range(9))
    pixels = decode(frame.data)[..., 0].astype(int)
    assert pixels.shape == ((32, 64) if matrix[0] else (64, 32))
    h, w = pixels.shape
    found = [pixels[y, x] for y in (h // 4, 3 * h // 4) for x in (w // 4, 3 * w // 4)]
    np.testing.assert_allclose(found, corners, atol=12)  # the codec is lossy; the greys are 80 apart


def test_a_truncated_video_ends_at_its_last_frame(tmp_path: Path) -> None:
    video = write_video(tmp_path / "x.ts", GREYS * 8, "mpegts")
    whole = open_frames(video)
    data = bytearray(video.read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    video.write_bytes(bytes(data))
    found = list(whole.read(range(99)))
    good = [frame for frame in found if not isinstance(frame.data, BadImage)]
    assert 0 < len(good) < 32


@pytest.mark.parametrize(
    ("change", "reason"),
    [(Path.unlink, "cannot be opened: No such file"), (lambda path: path.write_bytes(b"no video"), "damaged: Invalid")],
)
def test_a_video_that_changes_after_its_header_was_read_gives_a_reason(tmp_path: Path, change, reason: str) -> None:
    video = open_frames(write_video(tmp_path / "x.mp4"))
    change(tmp_path / "x.mp4")
    (frame,) = video.read(range(9))
    assert (frame.number, frame.name) == (0, "frame 1")
    assert frame.data.reason.startswith(reason) and frame.data.reason.endswith("; later frames are skipped")


def test_files_that_are_no_video_are_an_error(tmp_path: Path) -> None:
    pytest.importorskip("av")
    (tmp_path / "x.mp4").write_bytes(b"no video")
    with pytest.raises(DinoError, match=r"x\.mp4 cannot be read as a video"):
        open_frames(tmp_path / "x.mp4")


def test_without_pyav_the_error_names_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "x.mp4").touch()
    with pytest.raises(DinoError, match="need the package av") as caught:
        open_frames(tmp_path / "x.mp4")
    assert "dinocli[video]" in caught.value.hint


def test_a_video_is_identified_by_its_suffix() -> None:
    assert is_video(Path("a/B.MOV")) and not is_video(Path("a.jpg")) and not is_video(Path("mp4"))
