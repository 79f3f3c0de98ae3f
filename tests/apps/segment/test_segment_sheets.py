from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_images
from PIL import Image

from dinocli.apps.segment import sheets as module
from dinocli.apps.segment.colors import fit_colors
from dinocli.apps.segment.edges import refine
from dinocli.apps.segment.foreground import foreground
from dinocli.apps.segment.linear_head import SegmentationHead
from dinocli.apps.segment.sheets import draw_classes, draw_colors, draw_foreground
from dinocli.features.encoder import Encoder


def photo(folder: Path, height: int = 60, width: int = 90) -> Path:
    path = folder / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return path


def test_a_foreground_gives_a_sheet_and_a_mask_at_the_photos_size(tmp_path: Path, encoder: Encoder) -> None:
    path = photo(tmp_path)
    options = {"keep": 0.5, "tau": 0.6, "short_side": 48}
    for by in ("attention", "cut", "border"):
        drawn = draw_foreground(encoder, path, tmp_path / by / "a.b", by=by, masks=True, **options)
        assert drawn.picture == tmp_path / by / "a.b.png"
        assert drawn.mask == tmp_path / by / "a.b-mask.png"
        pixels = np.array(Image.open(path))
        mask = np.asarray(Image.open(drawn.mask))
        result = foreground(encoder, pixels, 48, by, keep=0.5, tau=0.6)
        np.testing.assert_array_equal(mask, refine(result.mask, pixels) * np.uint8(255))
        assert drawn.shares == {"foreground": pytest.approx(mask.mean() / 255)}
        assert Image.open(drawn.picture).width > 3 * 180, "photo, map and foreground, enlarged until captions fit"
    assert draw_foreground(encoder, path, tmp_path / "c", by="cut", masks=False, **options).mask is None


def test_classes_get_a_sheet_and_an_index_mask(tmp_path: Path, encoder: Encoder) -> None:
    weight = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    head = SegmentationHead(weight, torch.zeros(3), ["sky", "sea", "shore"], 48, encoder.fingerprint)
    drawn = draw_classes(encoder, head, photo(tmp_path), tmp_path / "out" / "a", short_side=None, masks=True)
    with Image.open(drawn.mask) as mask:
        assert mask.mode == "P"
        values = np.asarray(mask)
    np.testing.assert_array_equal(values, head.classify(encoder, np.array(Image.open(tmp_path / "photo.png"))))
    assert sum(drawn.shares.values()) == pytest.approx(1)
    for i, name in enumerate(head.classes):
        assert drawn.shares.get(name, 0) == pytest.approx((values == i).mean())
    assert draw_classes(encoder, head, tmp_path / "photo.png", tmp_path / "b", short_side=24, masks=False).mask is None


def test_colors_fill_sheet_after_sheet(tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = sorted(write_images(tmp_path / "photos", 5, 40).iterdir())
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    monkeypatch.setattr(module, "_ACROSS", 2)
    monkeypatch.setattr(module, "_DOWN", 1)
    colors, done = fit_colors(encoder, photos, 32, "attention"), []
    pages, skipped = draw_colors(
        encoder, colors, [photos[0], bad, *photos[1:]], tmp_path / "out", short_side=32, report=done.append
    )
    assert [page.name for page in pages] == ["pca.png", "pca-2.png", "pca-3.png"]
    assert list(skipped) == [bad]
    assert done == [1, 2, 3, 4, 5, 6]
    page = np.asarray(Image.open(pages[0]))
    tokens = encoder.patches(encoder.photo(np.array(Image.open(photos[1])), 32))[0]
    painted = colors.paint(tokens, 240, 240)
    height, width = page.shape[0] - 480, page.shape[1] - 480
    assert 0 < height < 60
    assert 0 < width < 60
    gap = width // 3
    np.testing.assert_array_equal(page[gap + 240 + (height - gap) // 2 :][:240, 2 * gap + 240 :][:, :240], painted)


def test_an_unreadable_photo_gives_a_reason(tmp_path: Path, encoder: Encoder) -> None:
    (tmp_path / "x.jpg").write_bytes(b"no image")
    head = SegmentationHead(torch.zeros(2, 16), torch.zeros(2), ["a", "b"], 48, encoder.fingerprint)
    name = tmp_path / "x"
    result = draw_foreground(encoder, tmp_path / "x.jpg", name, by="cut", keep=0.6, tau=0.2, short_side=24, masks=True)
    assert "not an image" in result
    assert "not an image" in draw_classes(encoder, head, tmp_path / "x.jpg", name, short_side=24, masks=True)
    assert not list(tmp_path.glob("*.png"))
