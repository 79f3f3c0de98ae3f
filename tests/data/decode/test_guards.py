from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image

from dinocli.data.decode.guards import Reader, TooSlow, check_tags, gif_frames, too_many_scans


def test_a_reader_raises_when_its_budget_is_used_up() -> None:
    reader = Reader(b"x" * 1000)
    reader.left = 3
    assert reader.read(10) == b"x" * 10
    with pytest.raises(TooSlow):
        for _ in range(5):
            reader.read(1)
    large = Reader(b"x" * 100_000)
    large.left = 100
    with pytest.raises(TooSlow):
        large.read()


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_tiff_whose_tag_holds_millions_of_values_is_refused(order: str) -> None:
    def made(values: int) -> bytes:
        head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
        entry = struct.pack(order + "HHII", 273, 4, values, 26)
        return head + struct.pack(order + "H", 1) + entry + bytes(4) + bytes(min(values * 4, 3_000_000))

    check_tags(made(1000))
    with pytest.raises(TooSlow):
        check_tags(made(700_000))


def test_a_jpeg_with_a_thousand_scans_is_refused_but_not_a_progressive_photo() -> None:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    assert too_many_scans(Image.open(io.BytesIO(data)), data) == ""
    many = data + b"\xff\xda" * 5000
    assert too_many_scans(Image.open(io.BytesIO(many)), many).startswith("too slow: ")


def test_frames_of_a_gif_are_counted_without_decoding() -> None:
    file = io.BytesIO()
    frames = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 40), dtype=np.uint8)) for i in range(4)]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    assert gif_frames(file.getvalue()) == 4
    assert gif_frames(b"GIF89a") == gif_frames(file.getvalue()[:30]) == 1
