from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_images
from PIL import Image

from dinocli.apps.segment import colors as module
from dinocli.apps.segment.colors import fit_colors
from dinocli.core.errors import DinoError
from dinocli.features.encoder import Encoder


def sample(count: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens of a background and of a distant foreground with its own directions, and the foreground mask."""
    random = np.random.default_rng(0)
    inside = np.arange(count) % 4 == 0
    tokens = 0.05 * random.normal(size=(count, 6))
    tokens[:, 0] += np.where(inside, -3, 1)
    tokens[inside, 1:4] += random.normal(size=(int(inside.sum()), 3)) * [0.9, 0.6, 0.3]
    return torch.from_numpy(tokens), torch.from_numpy(inside)


def test_the_foreground_is_colored_and_the_background_black() -> None:
    tokens, inside = sample()
    for mask in (inside, inside & (torch.rand(len(inside), generator=torch.Generator().manual_seed(0)) < 0.7)):
        colors = module._fit_axes(tokens, mask, {})
        painted = torch.from_numpy(colors.paint(tokens.view(20, 20, 6), 20, 20)).flatten(0, 1)
        np.testing.assert_array_equal(painted.any(1).numpy(), inside.numpy())
        # The axes are the foreground's three directions, the widest first, each scaled to the same spread.
        for axis in range(3):
            assert colors.axes[:, axis].abs().argmax() == axis + 1
        spread = ((tokens[inside] - colors.middle) @ colors.axes).std(0)
        torch.testing.assert_close(spread, torch.full((3,), 0.5, dtype=torch.float64), rtol=0.01, atol=0)
        # The mean of the foreground is gray.
        assert painted[inside].double().mean(0).sub(127.5).abs().max() < 10


def test_the_mask_orients_the_first_component() -> None:
    tokens, inside = sample()
    ours, theirs = module._fit_axes(tokens, inside, {}), module._fit_axes(tokens, ~inside, {})
    torch.testing.assert_close(ours.first, -theirs.first)
    assert ours.least == pytest.approx(-theirs.least)
    painted = theirs.paint(tokens.view(20, 20, 6), 20, 20).reshape(-1, 3)
    np.testing.assert_array_equal(painted.any(1), ~inside.numpy())


def test_without_a_foreground_all_patches_are_used() -> None:
    tokens, inside = sample()
    colors = module._fit_axes(tokens, torch.zeros_like(inside), {})
    assert colors.least is None
    torch.testing.assert_close(colors.middle, tokens.mean(0))
    with pytest.raises(DinoError, match="four patches"):
        module._fit_axes(tokens[:3], inside[:3], {})


def test_a_patch_has_the_same_color_in_every_photo_and_size() -> None:
    tokens, inside = sample()
    colors = module._fit_axes(tokens, inside, {})
    one = tokens[inside][:1].expand(6, 6)[None].view(2, 3, 6)
    assert len(np.unique(colors.paint(one, 40, 70).reshape(-1, 3), axis=0)) == 1
    np.testing.assert_array_equal(colors.paint(one, 7, 5)[0, 0], colors.paint(one[:1, :1], 9, 9)[0, 0])


def test_the_sample_of_many_photos_is_bounded(
    tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = sorted(write_images(tmp_path, 8, 48).iterdir())
    (tmp_path / "bad.png").write_bytes(b"no image")
    monkeypatch.setattr(module, "PHOTOS", 5)
    monkeypatch.setattr(module, "PATCHES", 50)
    sizes: list[int] = []
    fit_axes = module._fit_axes
    monkeypatch.setattr(module, "_fit_axes", lambda tokens, *more: sizes.append(len(tokens)) or fit_axes(tokens, *more))
    done: list[int] = []
    first = fit_colors(encoder, photos, 48, "cut", tau=0.9, report=done.append)
    assert sizes == [50], "ten of the 36 patches of each of five photos"
    assert done == [1, 2, 3, 4, 5]
    again = fit_colors(encoder, photos, 48, "cut", tau=0.9)
    torch.testing.assert_close(first.axes, again.axes, rtol=0, atol=0)
    monkeypatch.setattr(module, "PHOTOS", 100)
    assert list(fit_colors(encoder, [tmp_path / "bad.png", *photos], 48, "attention").skipped) == [tmp_path / "bad.png"]
    with pytest.raises(DinoError, match="none of the images"):
        fit_colors(encoder, [tmp_path / "bad.png"], 48, "cut")


def test_the_sample_holds_every_patch_of_a_few_photos(tmp_path: Path, encoder: Encoder) -> None:
    photos = []
    for i, shape in enumerate(((48, 48), (48, 96))):
        photos.append(tmp_path / f"{i}.png")
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (*shape, 3), dtype=np.uint8)).save(photos[-1])
    colors = fit_colors(encoder, photos, 48, "cut")
    every = [encoder.patches(encoder.photo(np.array(Image.open(path)), 48)).flatten(0, 2) for path in photos]
    torch.testing.assert_close(colors.mean, torch.cat(every).double().mean(0))
