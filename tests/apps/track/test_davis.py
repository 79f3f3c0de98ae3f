from __future__ import annotations

import math

import numpy as np
import pytest

from dinocli.apps.track.davis import boundary, boundary_f, frame_scores, video_score, widened
from dinocli.data.sources.label_maps import LabelMap


def blobs(seed: int, height: int = 40, width: int = 60, shift: int = 0) -> np.ndarray:
    """Draw three ellipses, some across the border."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    mask = np.zeros((height, width), dtype=bool)
    for _ in range(3):
        cy, cx = generator.uniform(0, height), generator.uniform(0, width) + shift
        ry, rx = generator.uniform(3, 12, 2)
        mask |= ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 <= 1
    return mask


def plain_outline(mask: np.ndarray) -> np.ndarray:
    """Return the outline as David Martin's tool does: each pixel is compared right, down and diagonally, if possible."""
    height, width = mask.shape
    found = np.zeros_like(mask)
    for i in range(height):
        for j in range(width):
            others = []
            if j + 1 < width:
                others.append(mask[i, j + 1])
            if i + 1 < height:
                others.append(mask[i + 1, j])
            if j + 1 < width and i + 1 < height:
                others.append(mask[i + 1, j + 1])
            found[i, j] = any(other != mask[i, j] for other in others)
    return found


def plain_f(mask: np.ndarray, truth: np.ndarray) -> float:
    bound = math.ceil(0.008 * math.hypot(*mask.shape))
    ours, theirs = np.argwhere(plain_outline(mask)), np.argwhere(plain_outline(truth))
    if len(ours) == 0 or len(theirs) == 0:
        return float(len(ours) == len(theirs))
    distances = np.linalg.norm(ours[:, None] - theirs[None], axis=2)
    precision, recall = (distances.min(1) <= bound).mean(), (distances.min(0) <= bound).mean()
    return 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize("seed", range(6))
def test_boundary_f_equals_the_plain_definition(seed: int) -> None:
    mask, truth = blobs(seed), blobs(seed, shift=1 + seed % 3)
    np.testing.assert_array_equal(boundary(mask), plain_outline(mask))
    assert 0 < plain_f(mask, truth) < 1
    assert boundary_f(mask, truth) == pytest.approx(plain_f(mask, truth), abs=1e-12)


@pytest.mark.parametrize("radius", [0, 1, 5, 50])
def test_widened_covers_all_pixels_within_the_radius(radius: int) -> None:
    mask = np.random.default_rng(radius).random((13, 21)) > 0.98
    mask[0, 0] = mask[12, 20] = True
    distances = np.linalg.norm(np.argwhere(np.ones_like(mask))[:, None] - np.argwhere(mask)[None], axis=2)
    np.testing.assert_array_equal(widened(mask, radius), (distances.min(1) <= radius).reshape(mask.shape))


def test_masks_without_an_outline_score_1_or_0() -> None:
    none, full, some = np.zeros((20, 20), bool), np.ones((20, 20), bool), np.eye(20, dtype=bool)
    assert boundary_f(none, none) == 1
    assert boundary_f(none, some) == boundary_f(some, none) == 0
    assert boundary_f(full, none) == 1, "the tool compares outlines only"


def test_objects_and_frames_are_weighted_equally() -> None:
    truth = np.zeros((40, 40), np.uint8)
    truth[:10, :10], truth[20:, 20:] = 1, 2
    halved = truth.copy()
    halved[:10, 5:10] = 0
    scores = [frame_scores(found, LabelMap(truth), [1, 2]) for found in (truth, halved)]
    assert scores[1][:, 0].tolist() == [0.5, 1.0]
    score = video_score(scores, [1, 2])
    assert score.frames == 2 and set(score.objects) == {1, 2}
    assert score.objects[1].j == 0.75 and score.objects[2].j_and_f == 1
    assert score.mean.j == 0.875
    assert score.mean.f == pytest.approx((score.objects[1].f + 1) / 2)


def test_void_pixels_of_the_truth_count_in_neither_mask() -> None:
    truth = np.zeros((40, 40), np.uint8)
    truth[:20, :10], truth[:20, 10:20] = 1, 255
    spilled, halved = np.where(truth == 255, 1, truth), np.where(truth == 255, 0, truth)
    halved[10:20] = 0
    palette = bytes(768)
    assert frame_scores(spilled, LabelMap(truth, palette), [1]).tolist() == [[1, 1]], "pixels in the void do not count"
    # By hand: half of the object remains; the void belongs neither to object nor to mask.
    score = frame_scores(halved, LabelMap(truth, palette), [1])[0]
    assert score[0] == 0.5 and score[1] == boundary_f(halved == 1, truth == 1)
    assert frame_scores(spilled, LabelMap(truth), [1])[0, 0] == 0.5, "in a grey mask 255 is an object as any other"
