"""Single frames of videos: the frame that is shown at each time, in every container, also where a seek goes wrong."""

from __future__ import annotations

import gc
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dinocli.data.decode import video
from dinocli.data.decode.raster import UnfitArray
from dinocli.data.decode.video import frame_times, read_frame
from dinocli.data.images import DEFAULTS, ImagesConfig

av: Any = pytest.importorskip("av")
RATE, FRAMES, STEP = 30, 60, 4  # frame n is flat grey of level 4 n


# Frames before a keyframe, in the order in which they are shown, may depend on it.
OPEN = "open-gop=1:keyint=20:min-keyint=20:bframes=3:b-adapt=0:scenecut=0"


def film(path: Path, frames: int = FRAMES, x264: str = "") -> str:
    """Write two seconds of video with a keyframe every 20 frames and, where the codec has them, B-frames."""
    codec = {".webm": "libvpx-vp9", ".mpg": "mpeg1video", ".avi": "mpeg4"}.get(path.suffix, "libx264")
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.options = {"x264-params": x264} if x264 else {"g": "20"}
        stream.codec_context.bit_rate = 4_000_000
        for number in range(frames):
            level = np.full((48, 64, 3), STEP * number, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(level, format="rgb24")):
                file.mux(packet)
        for packet in stream.encode():
            file.mux(packet)
    return str(path)


def number_at(path: str, time: float) -> int:
    return round(np.asarray(read_frame(path, time, DEFAULTS)).mean() / STEP)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts", ".flv", ".webm", ".avi", ".mpg"])
def test_the_frame_at_a_time_is_the_one_that_is_shown(tmp_path: Path, suffix: str) -> None:
    try:
        path = film(tmp_path / f"a{suffix}")
    except (av.error.FFmpegError, ValueError) as error:
        pytest.skip(f"this FFmpeg does not write it: {error}")
    times = frame_times(path, 0.2)
    # MPEG-PS states no duration, and FFmpeg estimates one from the bit rate.
    assert times == pytest.approx([0.2 * n for n in range(len(times))]) and (len(times) == 10 or suffix == ".mpg")
    order = np.random.default_rng(0).permutation(len(times))
    found = [number_at(path, times[i]) for i in order]
    off = 1 if suffix == ".mpg" else 0  # FFmpeg's writer of MPEG-PS shifts times by up to a frame
    np.testing.assert_allclose(found, 6 * order, atol=off)
    assert abs(number_at(path, 19.5 / RATE) - 19) <= off, "just before a keyframe"


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
def test_frames_before_the_keyframe_of_an_open_group_and_the_last_one_are_reached(tmp_path: Path, suffix: str) -> None:
    """A decoder that starts at the keyframe skips them, and the last ones come only when it is flushed."""
    path = film(tmp_path / f"a{suffix}", x264=OPEN)
    for number in (*range(15, 22), *range(36, 41), 57, 58, 59):
        assert number_at(path, number / RATE) == number


def shown_color(path: Path, size: tuple[int, int], matrix: int | None) -> Any:
    """Write a video of one color that states a color matrix, or none, and return the color that is read."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt, stream.options = *size, "yuv420p", {"crf": "1"}
        if matrix is not None:
            stream.codec_context.colorspace = matrix
        frame = av.VideoFrame(*size, "yuv420p")
        for plane, level in zip(frame.planes, YUV, strict=True):
            plane.update(bytes([level]) * plane.buffer_size)
        for packet in [*stream.encode(frame), *stream.encode()]:
            file.mux(packet)
    return np.asarray(read_frame(str(path), 0, DEFAULTS))[20, 20]


YUV = (120, 90, 170)
WEIGHTS = {"BT.601": (0.299, 0.114), "BT.709": (0.2126, 0.0722)}  # of red and blue in luma


@pytest.mark.parametrize(
    ("size", "matrix", "expected"),
    [
        ((1280, 720), None, "BT.709"),
        ((640, 480), None, "BT.601"),
        ((720, 576), None, "BT.601"),
        ((600, 800), None, "BT.709"),
        ((1280, 720), 5, "BT.601"),
        ((1280, 720), 6, "BT.601"),
        ((640, 480), 1, "BT.709"),
    ],
)
def test_colors_are_those_of_the_stated_matrix_or_of_the_usual_one(
    tmp_path: Path, size: tuple[int, int], matrix: int | None, expected: str
) -> None:
    """FFmpeg takes every file that states no matrix for BT.601. In red it differs by 8 levels here."""
    red, blue = WEIGHTS[expected]
    y, u, v = (YUV[0] - 16) / 219, (YUV[1] - 128) / 224, (YUV[2] - 128) / 224
    r, b = y + 2 * (1 - red) * v, y + 2 * (1 - blue) * u
    g = (y - red * r - blue * b) / (1 - red - blue)
    np.testing.assert_allclose(shown_color(tmp_path / "a.mp4", size, matrix), np.multiply(255, (r, g, b)), atol=2.5)


def test_a_seek_that_lands_too_late_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, decode = film(tmp_path / "a.mp4"), video._decode

    def late(file: Any, stream: Any, time: float, seek: bool) -> Any:
        return decode(file, stream, time + 1 if seek else 0, seek)

    monkeypatch.setattr(video, "_decode", late)
    assert number_at(path, 0.5) == 15
    monkeypatch.setattr(video, "_decode", lambda *a: iter(()) if a[3] else decode(*a))
    assert number_at(path, 0.5) == 15, "a seek that finds nothing"


def test_a_time_is_reached_without_decoding_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, decode, seen = film(tmp_path / "a.mp4"), video._decode, []

    def counted(*arguments: Any) -> Any:
        for frame in decode(*arguments):
            seen.append(frame.pts)
            yield frame

    monkeypatch.setattr(video, "_decode", counted)
    number_at(path, 45 / RATE)
    assert len(seen) <= 7, "frames 40 to 46: from the keyframe before it to the frame after it"


def test_the_frame_is_turned_as_the_display_matrix_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = film(tmp_path / "a.mp4", frames=2)
    monkeypatch.setattr(video, "orientation", lambda frame: 6)
    assert read_frame(path, 0, DEFAULTS).size == (48, 64)


def test_what_is_no_video_and_what_is_too_large_are_reasons(tmp_path: Path) -> None:
    with pytest.raises(UnfitArray, match="too large: 64x48 pixels"):
        read_frame(film(tmp_path / "a.mp4", 2), 0, ImagesConfig(max_megapixels=0.001))
    with av.open(str(tmp_path / "sound.mka"), "w") as file:
        stream = file.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        for packet in [*stream.encode(sound), *stream.encode()]:
            file.mux(packet)
    with pytest.raises(UnfitArray, match="no image: a file without a video stream"):
        frame_times(str(tmp_path / "sound.mka"), 1)


def test_a_frame_that_was_read_before_a_fork_does_not_stop_the_garbage_collector_of_a_worker(tmp_path: Path) -> None:
    path = film(tmp_path / "a.mp4")
    gc.collect()
    gc.disable()
    try:
        number_at(path, 1.0)
        # Freeing FFmpeg's threads waits for them, and a forked process does not have them.
        child = multiprocessing.get_context("fork").Process(target=gc.collect)
        child.start()
    finally:
        gc.enable()
    child.join(30)
    child.kill()
    assert child.exitcode == 0
