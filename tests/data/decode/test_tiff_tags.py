"""TIFF tags of both byte orders, of both sizes of offsets, and of corrupt files."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image

from dinocli.data.decode.tiff_tags import Directory, read_facts

LAYOUTS = [(order, big) for order in "<>" for big in (False, True)]
NAMES = [f"{'little' if order == '<' else 'big'}-endian{' BigTIFF' if big else ''}" for order, big in LAYOUTS]


def tiff(order: str, big: bool, *pages: dict[int, list[int]]) -> bytes:
    """Return a TIFF of directories without pixels, whose tags hold 16-bit numbers."""
    offset, entry, room = ("Q", "HHQ", 8) if big else ("I", "HHI", 4)
    mark = b"II" if order == "<" else b"MM"
    head = mark + struct.pack(order + ("HHHQ" if big else "HI"), *((43, 8, 0, 16) if big else (42, 8)))
    data = head
    for number, tags in enumerate(pages, 1):
        size = (8 if big else 2) + len(tags) * (20 if big else 12) + room
        block, far = struct.pack(order + ("Q" if big else "H"), len(tags)), b""
        for tag, numbers in tags.items():
            values = struct.pack(f"{order}{len(numbers)}H", *numbers)
            block += struct.pack(order + entry, tag, 3, len(numbers))
            if len(values) > room:
                block += struct.pack(order + offset, len(data) + size + len(far))
                far += values
            else:
                block += values.ljust(room, b"\0")
        after = len(data) + size + len(far) if number < len(pages) else 0
        data += block + struct.pack(order + offset, after) + far
    return data


FIRST = {256: [30], 257: [20], 258: [8, 8, 8], 262: [2], 277: [3]}


@pytest.mark.parametrize(("order", "big"), LAYOUTS, ids=NAMES)
def test_numbers_are_read_from_their_entry_or_from_their_offset(order: str, big: bool) -> None:
    tags = Directory(tiff(order, big, {256: [30], 258: [8, 9, 10, 11, 12]}))
    assert (tags.order, tags.big) == (order, big)
    assert tags.one(256, 7) == 30
    assert tags.one(257, 7) == 7
    assert tags.values(257) is None
    values = tags.values(258)
    assert values is not None
    assert values.tolist() == [8, 9, 10, 11, 12]
    assert [entry.tag for entry in tags.entries(1)] == [256]
    assert tags.next() == 0


@pytest.mark.parametrize(("order", "big"), LAYOUTS, ids=NAMES)
def test_facts_hold_the_defaults_of_missing_tags_and_count_pictures_without_previews_and_masks(
    order: str, big: bool
) -> None:
    facts = read_facts(tiff(order, big, FIRST, {254: [1]}, {254: [4]}, {254: [2]}, {256: [30]}))
    assert facts is not None
    assert (facts.order, facts.big, facts.width, facts.height, facts.samples) == (order, big, 30, 20, 3)
    assert (facts.bits, facts.format, facts.photometric, facts.compression) == ((8, 8, 8), 1, 2, 1)
    assert (facts.piece, facts.offsets.tolist(), facts.extra, facts.alpha) == ((30, 20), [], None, "")
    assert (facts.pages, facts.raw) == (3, False)
    assert facts.words == "a TIFF of 3 bands of 8 bits, RGB, compression 1"


def test_a_cycle_of_directories_ends() -> None:
    data = tiff("<", False, FIRST, {256: [30]})
    facts = read_facts(data[:-4] + data[4:8])  # the second directory points back to the first
    assert facts is not None
    assert facts.pages == 2


def test_a_cameras_raw_file_is_recognized_by_its_tags() -> None:
    for tags in ({50706: [1]}, {262: [32803]}, {262: [34892]}):
        facts = read_facts(tiff("<", False, FIRST | tags))
        assert facts is not None
        assert facts.raw


def test_colors_of_8_and_of_16_bits_give_the_same_palette() -> None:
    eight, sixteen = (
        read_facts(tiff("<", False, {256: [4], 257: [4], 262: [3], 320: [n * scale for n in range(6)]}))
        for scale in (1, 257)
    )
    assert eight is not None
    assert eight.colors is not None
    assert sixteen is not None
    np.testing.assert_array_equal(eight.colors, [[0, 2, 4], [1, 3, 5]])
    np.testing.assert_array_equal(sixteen.colors, eight.colors)


def test_files_of_other_formats_and_corrupt_ones_have_no_facts() -> None:
    file = io.BytesIO()
    Image.new("RGB", (30, 20)).save(file, "TIFF")
    data = file.getvalue()
    assert read_facts(data) is not None
    at = int.from_bytes(data[4:8], "little")
    for bad in (b"", b"\x89PNG", data[:4], data[:8], data[: at + 1], data[: at + 20]):
        assert read_facts(bad) is None
    beyond = tiff("<", False, {256: [30], 258: [8, 8, 8]})[:-2]
    assert read_facts(beyond) is None
    with pytest.raises(ValueError, match="beyond the end"):
        Directory(beyond).values(258)
    with pytest.raises(struct.error):
        Directory(data, len(data))
