#!/usr/bin/env bash
# In an MPEG program stream (.mpg, .vob), the time of a frame depends on whether decoding began at the start or by a seek.
#
# Few packets of a program stream state a time, and FFmpeg guesses the others. From the start its guesses are right. After
# a seek they are shifted until a later packet states a time, here by 2.5 frames. So a reader that seeks, decodes, and
# stops at the wanted time returns another frame than one that decodes the whole file. MP4 and MPEG-TS of the same frames
# have the same times both ways.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet av==18.1.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import io
from fractions import Fraction

import av
import numpy as np

FRAMES, RATE, TARGET = 60, 25, 29
print(f"PyAV {av.__version__}, libavformat", ".".join(map(str, av.library_versions["libavformat"])))


def encode(codec: str, container: str) -> bytes:
    """Encode a video in which the number of white columns tells the number of a frame."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=RATE)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 320, 64, "yuv420p", 4_000_000
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = 12, 2
        for number in range(FRAMES):
            pixels = np.zeros((64, 320, 3), np.uint8)
            pixels[:, : 5 * (number + 1)] = 255
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return file.getvalue()


def decode(data: bytes, seconds: float | None = None) -> dict[int, float]:
    """Return the time of each decoded frame by its number, from the start or after a seek."""
    with av.open(io.BytesIO(data)) as video:
        stream = video.streams.video[0]
        if seconds is not None:
            video.seek(int(seconds / stream.time_base), stream=stream)
        columns = ((frame, (frame.to_ndarray(format="gray")[32] > 128).sum()) for frame in video.decode(stream))
        return {round(int(count) / 5) - 1: float(frame.time) for frame, count in columns}


shifts = {}
for codec, container in (("mpeg2video", "vob"), ("mpeg2video", "mpegts"), ("mpeg4", "mp4")):
    data = encode(codec, container)
    right = decode(data)
    assert sorted(right) == list(range(FRAMES))
    gaps = [RATE * (right[number + 1] - right[number]) for number in range(FRAMES - 1)]
    assert max(abs(gap - 1) for gap in gaps) < 0.01, "from the start, all times are right"
    after = decode(data, right[TARGET])
    shifts[container] = {number: round(RATE * (time - right[number]), 2) for number, time in after.items()}
    print(f"{codec} in {container}: after a seek, times differ by {sorted(set(shifts[container].values()))} frames")
assert set(shifts["mpegts"].values()) == set(shifts["mp4"].values()) == {0.0}
assert min(shifts["vob"].values()) < -1, "times after a seek in a program stream are right now"
PYTHON
