from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinocli.apps.demo.drawings import draw
from dinocli.apps.segment import overlap as module
from dinocli.apps.segment.edges import refine
from dinocli.apps.segment.foreground import Foreground, cut, foreground
from dinocli.apps.segment.overlap import ELLIPSE, EVERYTHING, ellipse, overlaps
from dinocli.evals.attention import enlarge, jaccard
from dinocli.features.encoder import Encoder


def drawn(folder: Path, count: int) -> dict[Path, Path]:
    """Write drawn photos and masks of the demo."""
    pairs = {}
    for i in range(count):
        drawing, photo, mask = draw(i), folder / f"{i}.png", folder / f"{i}-mask.png"
        Image.fromarray(drawing.image).save(photo)
        Image.fromarray(drawing.mask.astype(np.uint8) * 255).save(mask)
        pairs[photo] = mask
    return pairs


def test_each_method_is_measured_per_pixel_with_trivial_baselines(tmp_path: Path, encoder: Encoder) -> None:
    pairs = drawn(tmp_path, 3)
    done = []
    result = overlaps(encoder, pairs, ["attention", "cut"], short_side=48, keep=0.4, tau=0.3, report=done.append)
    assert done == [1, 2, 3]
    for i, path in enumerate(pairs):
        drawing = draw(i)
        assert list(result.each[path]) == ["attention", "cut", EVERYTHING, ELLIPSE]
        for by in ("attention", "cut"):
            result_of_method = foreground(encoder, drawing.image, 48, by, keep=0.4, tau=0.3)
            assert result.each[path][by] == jaccard(refine(result_of_method.mask, drawing.image), drawing.mask)
        assert result.each[path][EVERYTHING] == drawing.mask.mean()
    assert result.means[EVERYTHING] == pytest.approx(np.mean([draw(i).mask.mean() for i in range(3)]))


def test_a_cut_by_color_finds_the_drawn_objects(
    tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Use features that separate the objects: the distance of a patch's color from the median color."""

    def by_color(encoder: Encoder, pixels: np.ndarray, side: int, by: str, **_: float) -> Foreground:
        patches = torch.from_numpy(pixels.reshape(12, 8, 12, 8, 3).mean((1, 3)).astype(np.float32))
        return cut(patches - patches.flatten(0, 1).median(0).values, 0.5)

    monkeypatch.setattr(module, "foreground", by_color)
    result = overlaps(encoder, drawn(tmp_path, 10), ["cut"], short_side=48)
    assert result.means["cut"] > result.means[ELLIPSE] + 0.05


def test_the_true_patch_mask_overlaps_almost_completely(
    tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo, mask = tmp_path / "a.png", tmp_path / "a-mask.png"
    truth = np.zeros((4, 6), dtype=bool)
    truth[1:3, 2:5] = True
    large = enlarge(truth, 64, 96)
    Image.fromarray(np.where(large[..., None], (220, 30, 30), (20, 40, 200)).astype(np.uint8)).save(photo)
    Image.fromarray(large.astype(np.uint8) * 255).save(mask)
    monkeypatch.setattr(module, "foreground", lambda *_, **__: Foreground(truth.astype(float), truth))
    assert overlaps(encoder, {photo: mask}, ["cut"], short_side=48).means["cut"] > 0.99


def test_unreadable_and_mismatched_masks_are_reported(tmp_path: Path, encoder: Encoder) -> None:
    pairs = drawn(tmp_path, 4)
    photos = list(pairs)
    photos[0].write_bytes(b"no image")
    pairs[photos[1]].write_bytes(b"no image")
    Image.new("L", (5, 4)).save(pairs[photos[2]])
    result = overlaps(encoder, pairs, ["cut"], short_side=24)
    assert list(result.each) == photos[3:]
    assert "not an image" in result.skipped[photos[0]]
    assert result.skipped[photos[1]].startswith("its mask: damaged")
    assert result.skipped[photos[2]] == "it has 96x96 pixels, but its mask has 5x4"
    assert overlaps(encoder, {}, ["cut"], short_side=24).means == {}


def test_the_ellipse_is_centered() -> None:
    mask = ellipse(300, 400)
    assert mask.mean() == pytest.approx(np.pi / 9, abs=0.002)
    assert (mask == mask[::-1, ::-1]).all()
    assert mask[:, 200].sum() == pytest.approx(200, abs=2)
    assert mask[150].sum() == pytest.approx(267, abs=2)
