from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest
import torch
from conftest import peak_of
from torch.nn import functional as F

from dinocli.apps.track import propagate as module
from dinocli.apps.track.propagate import Looking, Rule, decide, one_hot, propagate, track
from dinocli.features.encoder import Encoder


def plain(patches: torch.Tensor, sources: torch.Tensor, labels: torch.Tensor, rule: Rule) -> torch.Tensor:
    """Propagate patch by patch, as defined."""
    height, width, _ = patches.shape
    made = torch.zeros(labels.shape[1], height, width, dtype=patches.dtype)
    for i, j in product(range(height), range(width)):
        found = []
        for s, y, x in product(range(len(sources)), range(height), range(width)):
            if abs(y - i) <= rule.radius and abs(x - j) <= rule.radius:
                weight = torch.exp(patches[i, j] @ sources[s, y, x] / rule.temperature).item()
                found.append((weight, labels[s, :, y, x]))
        best = sorted((weight for weight, _ in found), reverse=True)[: rule.top]
        kept = [(weight, label) for weight, label in found if weight >= best[-1]]
        total = sum(weight for weight, _ in kept)
        made[:, i, j] = sum(weight / total * label for weight, label in kept)
    return made


@pytest.mark.parametrize("rule", [Rule(radius=2), Rule(radius=12, top=3), Rule(radius=0, top=5, temperature=0.02)])
@pytest.mark.parametrize("tile", [3, 16])
def test_propagation_equals_the_plain_definition(monkeypatch: pytest.MonkeyPatch, rule: Rule, tile: int) -> None:
    monkeypatch.setattr(module, "_TILE", tile)
    torch.manual_seed(0)
    patches = F.normalize(torch.randn(5, 7, 4, dtype=torch.float64), dim=-1)
    sources = F.normalize(torch.randn(3, 5, 7, 4, dtype=torch.float64), dim=-1)
    labels = torch.rand(3, 2, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(
        propagate(patches, sources, labels, rule), plain(patches, sources, labels, rule), rtol=0, atol=1e-12
    )


def test_ties_with_the_last_source_patch_are_included() -> None:
    same = F.normalize(torch.ones(1, 6, 3, dtype=torch.float64), dim=-1)
    labels = torch.zeros(1, 2, 1, 6, dtype=torch.float64)
    labels[0, 0, 0, :2], labels[0, 1, 0, 2:] = 1, 1
    made = propagate(same, same[None], labels, Rule(top=2))
    torch.testing.assert_close(made[:, 0, 0], torch.tensor([1 / 3, 2 / 3], dtype=torch.float64))


def test_the_center_of_a_patch_decides_its_label() -> None:
    labels = np.zeros((6, 9), np.uint8)
    labels[4, 1] = 5
    hot = one_hot(labels, [0, 5], (2, 3))
    assert hot[1].tolist() == [[False, False, False], [True, False, False]]
    assert (hot.sum(0) == 1).all()


def test_the_label_with_the_largest_stretched_share_is_chosen() -> None:
    torch.manual_seed(0)
    shares = torch.rand(3, 4, 5, dtype=torch.float64) * torch.tensor([1, 0.3, 0.1])[:, None, None]
    large = F.interpolate(shares[None], scale_factor=8, mode="bilinear", align_corners=False)[0]
    for label in large:  # as the original's norm_mask
        label -= label.min()
        label /= label.max()
    torch.testing.assert_close(decide(shares, (32, 40)), large.argmax(0))
    gone = torch.stack([torch.ones(4, 5), torch.zeros(4, 5)])
    assert not decide(gone, (8, 8)).any(), "a vanished object does not return"


def moving(frames: int, size: int = 64) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield frames of a speckled square that moves right over speckled ground, and its mask."""
    generator = np.random.default_rng(0)
    ground, thing = (generator.integers(0, 256, (size, size, 3), dtype=np.uint8) for _ in range(2))
    for i in range(frames):
        frame, labels = ground.copy(), np.zeros((size, size), np.uint8)
        here = slice(16, 40), slice(8 * i, 8 * i + 24)
        frame[here], labels[here] = thing[:24, :24], 9
        yield frame, labels


def test_a_moving_object_is_tracked(encoder: Encoder) -> None:
    frames, truth = zip(*moving(5), strict=True)
    found = list(track(encoder, frames[0], truth[0], frames[1:], looking=Looking(short_side=64, layer=1)))
    assert len(found) == 4
    for labels, true in zip(found, truth[1:], strict=True):
        assert set(np.unique(labels)) == {0, 9}
        overlap = ((labels == 9) & (true == 9)).sum() / ((labels == 9) | (true == 9)).sum()
        still = ((truth[0] == 9) & (true == 9)).sum() / ((truth[0] == 9) | (true == 9)).sum()
        assert overlap > max(0.6, still)


def test_each_frame_uses_the_first_and_the_last_few_frames(monkeypatch: pytest.MonkeyPatch, encoder: Encoder) -> None:
    source_counts = []
    monkeypatch.setattr(module, "propagate", lambda p, s, t, r: source_counts.append(len(s)) or propagate(p, s, t, r))
    frames, truth = zip(*moving(6), strict=True)
    list(track(encoder, frames[0], truth[0], frames[1:], Rule(previous=3), Looking(short_side=32)))
    assert source_counts == [1, 2, 3, 4, 4]


def test_a_long_video_uses_no_more_memory_than_a_short_one(encoder: Encoder) -> None:
    frame, labels = next(moving(1))

    def follow(frames: int) -> int:
        going = track(encoder, frame, labels, (frame for _ in range(frames)), Rule(previous=2), Looking(32))
        return peak_of(lambda: [None for _ in going])

    assert follow(12) < 1.2 * follow(3)
