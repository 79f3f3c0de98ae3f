from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from dinocli.apps.attention.sheets import Block, attention_sheet, draw
from dinocli.evals.attention import AttentionMaps
from dinocli.features.encoder import Encoder
from dinocli.viz import picture as module


def test_a_photo_of_any_shape_gets_its_sheet_and_its_maps(tmp_path: Path, encoder: Encoder) -> None:
    photo = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8)).save(photo)
    drawn = draw([encoder], photo, tmp_path / "out" / "photo", keep=0.5, size=32, raw=True)
    assert drawn.picture == tmp_path / "out" / "photo.png"
    raw = load_file(drawn.raw)
    assert raw["heads"].shape == raw["masks"].shape == (2, 4, 7)
    with Image.open(drawn.picture) as sheet:
        assert sheet.width > 4 * 90, "photo, two heads and their mean"
    assert draw([encoder], photo, tmp_path / "out" / "again", keep=0.5, size=None, raw=False).raw is None


def test_an_unreadable_photo_gives_a_reason(tmp_path: Path, encoder: Encoder) -> None:
    (tmp_path / "x.jpg").write_bytes(b"no image")
    assert "not an image" in draw([encoder], tmp_path / "x.jpg", tmp_path / "x", keep=0.6, size=None, raw=False)


def test_a_huge_photo_is_reduced_in_the_sheet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PANEL_PIXELS", 10_000)
    maps = AttentionMaps(np.random.default_rng(0).random((2, 4, 4), dtype=np.float32))
    sheet = attention_sheet(np.zeros((300, 400, 3), dtype=np.uint8), [Block("x", maps)], 0.6)
    assert sheet.width < 4 * 130


def test_a_tiny_photo_is_enlarged_until_its_captions_fit() -> None:
    maps = AttentionMaps(np.random.default_rng(0).random((2, 4, 4), dtype=np.float32))
    assert attention_sheet(np.zeros((32, 32, 3), dtype=np.uint8), [Block("x", maps)], 0.6).width > 4 * module._TILE_SIDE


def test_attention_that_is_not_finite_gives_a_reason_and_no_picture(
    tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo = tmp_path / "photo.png"
    Image.new("RGB", (32, 32), (9, 99, 199)).save(photo)
    monkeypatch.setattr(type(encoder.backbone), "attention", lambda self, images: torch.full((1, 2, 5, 5), torch.nan))
    reason = draw([encoder], photo, tmp_path / "out" / "photo", keep=0.6, size=16, raw=True)
    assert reason == "not finite: 8 of 8 values of attention"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("heads", "columns", "lines"), [(6, 8, 2), (12, 7, 4), (16, 6, 6)])
def test_many_heads_are_wrapped_evenly(heads: int, columns: int, lines: int) -> None:
    maps = AttentionMaps(np.random.default_rng(0).random((heads, 4, 4), dtype=np.float32))
    drawn = attention_sheet(np.full((200, 200, 3), 90, np.uint8), [Block("x", maps)], 0.6)
    tile = 200 + 5  # and the gap
    assert drawn.width == 5 + columns * tile
    assert drawn.height // (tile + 14) == lines


def test_each_network_has_a_titled_block_with_the_same_columns() -> None:
    one, three = (AttentionMaps(np.random.default_rng(0).random((heads, 4, 4), dtype=np.float32)) for heads in (1, 3))
    photo = np.full((200, 200, 3), 90, np.uint8)
    alone = attention_sheet(photo, [Block("a", three)], 0.6)
    both = attention_sheet(photo, [Block("b", one), Block("a", three)], 0.6)
    assert both.width == alone.width and both.height == 2 * (alone.height + 22), "and a line for each title"
    pixels, below = np.asarray(both), np.asarray(alone)
    np.testing.assert_array_equal(pixels[-alone.height :], below)
    assert (pixels[: alone.height + 22, 5 + 2 * 205 : 4 * 205] == 255).all(), "heads that only the other has"
    mean = slice(5 + 4 * 205, 5 + 4 * 205 + 200)
    assert not (pixels[22 + 5 : 22 + 205, mean] == 255).all(), "the mean stays in the last column"


def test_a_mask_gives_the_overlap_and_an_outline(tmp_path: Path, encoder: Encoder) -> None:
    photo, mask = tmp_path / "photo.png", tmp_path / "mask.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(photo)
    plain = draw([encoder], photo, tmp_path / "plain", keep=0.6, size=32, raw=True)
    head = np.repeat(np.repeat(load_file(plain.raw)["masks"][1], 16, 0), 16, 1)
    Image.fromarray(head * 255).save(mask)
    drawn = draw([encoder, encoder], photo, tmp_path / "out", keep=0.6, size=32, raw=False, mask=mask)
    assert [block.title for block in drawn.blocks] == ["x: Jaccard 1.000, head 2"] * 2, "it is the mask of that head"
    assert plain.blocks[0].overlap is None
    Image.fromarray(head[:32]).save(mask)
    said = draw([encoder], photo, tmp_path / "no", keep=0.6, size=32, raw=False, mask=mask)
    assert said == "it has 64x64 pixels, but its mask has 64x32"
    Image.new("L", (64, 64)).save(mask)
    assert (
        draw([encoder], photo, tmp_path / "no", keep=0.6, size=32, raw=False, mask=mask) == "its mask: it has no object"
    )
