from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from conftest import write_images
from PIL import Image

from dinocli.apps.search.retrieval import (
    GroundTruth,
    average_precision,
    features_of_files,
    read_ground_truth,
    retrieval,
    scores,
)
from dinocli.core.errors import DinoError
from dinocli.features.encoder import Encoder


def plain_ap(ranks: list[int], wanted: int) -> float:
    """Sum the trapezoids under the precision-recall curve, one correct image after another."""
    area = 0.0
    for found, rank in enumerate(ranks):
        before = 1.0 if rank == 0 else found / rank
        area += (before + (found + 1) / (rank + 1)) / 2 / wanted
    return area


def plain_score(cosines: np.ndarray, wanted: list[set[int]], junk: list[set[int]]) -> list[float]:
    """Compute mean AP and precisions at 1, 5 and 10 by loops over each ranking without junk."""
    rows = []
    for similarity, good, bad in zip(cosines, wanted, junk, strict=True):
        if not good:
            continue
        ranking = [i for i in sorted(range(len(similarity)), key=lambda i: -similarity[i]) if i not in bad]
        ranks = [place for place, i in enumerate(ranking) if i in good]
        precisions = []
        for k in (1, 5, 10):
            k = min(k, ranks[-1] + 1)
            precisions.append(sum(i in good for i in ranking[:k]) / k)
        rows.append([plain_ap(ranks, len(good)), *precisions])
    return (100 * np.mean(rows, axis=0)).tolist()


def truth(seed: int = 0, images: int = 40, queries: int = 12) -> GroundTruth:
    generator = np.random.default_rng(seed)
    kinds = generator.choice(4, size=(queries, images), p=[0.7, 0.1, 0.1, 0.1])
    kinds[0][kinds[0] == 1] = 0  # nothing easy
    kinds[1] = 0  # nothing at all
    parts = [[np.flatnonzero(row == kind) for row in kinds] for kind in (1, 2, 3)]
    names = ([f"i{n}" for n in range(images)], [f"q{n}" for n in range(queries)])
    return GroundTruth(*names, *parts)


def test_scores_equal_those_of_a_plain_loop_over_each_ranking() -> None:
    gnd = truth()
    cosines = np.random.default_rng(1).normal(size=(12, 40)).astype(np.float32)
    easy, hard, junk = ([set(rows.tolist()) for rows in part] for part in (gnd.easy, gnd.hard, gnd.junk))
    either = {
        "easy": (easy, [a | b for a, b in zip(junk, hard, strict=True)]),
        "medium": ([a | b for a, b in zip(easy, hard, strict=True)], junk),
        "hard": (hard, [a | b for a, b in zip(junk, easy, strict=True)]),
    }
    found = scores(cosines, gnd)
    assert [s.level for s in found] == list(either)
    for score in found:
        assert [score.mean_ap, *score.precisions] == pytest.approx(plain_score(cosines, *either[score.level]))
    assert [s.queries for s in found] == [10, 11, 11]


def test_unreadable_images_are_not_ranked() -> None:
    none = np.empty(0, np.int64)
    truth = GroundTruth(["a", "b", "c"], ["q"], [np.array([0, 2])], [none], [none])
    easy = scores(np.array([[0.9, 0.5, np.nan]], np.float32), truth)[0]
    assert easy.mean_ap == pytest.approx(50), "one of two is found, at rank 0; the other never"
    assert easy.precisions == pytest.approx([100, 20, 10])
    only = scores(np.array([[np.nan, 0.5, np.nan]], np.float32), truth)[0]
    assert (only.mean_ap, only.precisions, only.queries) == (0, [0, 0, 0], 1)


def test_a_level_without_queries_has_no_score() -> None:
    none = np.empty(0, np.int64)
    truth = GroundTruth(["a"], ["q"], [np.array([0])], [none], [none])
    hard = scores(np.ones((1, 1), np.float32), truth)[2]
    assert (hard.mean_ap, hard.precisions, hard.queries) == (None, None, 0)


def test_average_precision_of_the_best_and_the_worst_ranking() -> None:
    assert average_precision(np.arange(5), 5) == 1
    assert average_precision(np.array([], np.int64), 5) == 0
    assert average_precision(np.array([1]), 1) == pytest.approx((0 + 1 / 2) / 2)


def stored(gnd: GroundTruth) -> dict:
    each = [
        {"bbx": [0.0, 1.5], **{k: v.tolist() if i else v for k, v in zip(("easy", "hard", "junk"), parts, strict=True)}}
        for i, parts in enumerate(zip(gnd.easy, gnd.hard, gnd.junk, strict=True))
    ]
    return {"imlist": gnd.images, "qimlist": gnd.queries, "gnd": each}


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_the_files_of_the_sets_are_read(tmp_path: Path, protocol: int) -> None:
    gnd, path = truth(), tmp_path / "gnd_roxford5k.pkl"
    path.write_bytes(pickle.dumps(stored(gnd), protocol))
    (tmp_path / "gnd.json").write_text(json.dumps(stored(gnd), default=lambda rows: rows.tolist()))
    for file in (path, tmp_path / "gnd.json"):
        read = read_ground_truth(file)
        assert (read.images, read.queries) == (gnd.images, gnd.queries)
        for ours, theirs in zip((*read.easy, *read.hard, *read.junk), (*gnd.easy, *gnd.hard, *gnd.junk), strict=True):
            np.testing.assert_array_equal(ours, theirs)


class Evil:
    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self):
        return os.mkdir, (str(self.made),)


def test_reading_a_pickle_executes_no_code(tmp_path: Path) -> None:
    path = tmp_path / "gnd.pkl"
    path.write_bytes(pickle.dumps({"imlist": Evil(tmp_path / "made"), "qimlist": [], "gnd": []}))
    with pytest.raises(DinoError, match="more than plain numbers"):
        read_ground_truth(path)
    assert not (tmp_path / "made").exists()


def test_invalid_files_are_an_error_that_names_the_format(tmp_path: Path) -> None:
    for name, content in (
        ("none.pkl", None),
        ("torn.pkl", b"\x80"),
        ("list.json", b"[]"),
        ("beyond.json", b'{"imlist": ["a"], "qimlist": ["q"], "gnd": [{"easy": [1]}]}'),
        ("fewer.json", b'{"imlist": ["a"], "qimlist": ["q", "r"], "gnd": [{"easy": [0]}]}'),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(DinoError, match="gnd_roxford5k"):
            read_ground_truth(tmp_path / name)


def test_photos_keep_their_aspect_ratio(tmp_path: Path, encoder: Encoder) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 64, 3), dtype=np.uint8)).save(tmp_path / "wide.png")
    seen = []
    spied = encoder.backbone.class_tokens
    encoder.backbone.class_tokens = lambda images, *rest: seen.append(tuple(images.shape)) or spied(images, *rest)
    values, _ = features_of_files(encoder, [tmp_path / "wide.png"], size=32)
    many, _ = features_of_files(encoder, [tmp_path / "wide.png"], size=64, multiscale=True)
    assert seen == [(1, 3, 8, 32), (1, 3, 24, 64), (1, 3, 16, 40), (1, 3, 8, 32)]
    assert np.linalg.norm(values, axis=1) == pytest.approx([1])
    assert not np.allclose(values, many)


def test_a_set_is_scored_and_missing_photos_are_reported(tmp_path: Path, encoder: Encoder) -> None:
    folder = write_images(tmp_path / "jpg", 6)
    for path in folder.iterdir():
        Image.open(path).save(path.with_suffix(".jpg"), quality=95)
    names = [f"{i:04}" for i in range(6)]
    none = np.empty(0, np.int64)
    each = [np.array([0]), np.array([3]), np.array([5])]
    gnd = GroundTruth([*names[:5], "gone"], ["0000", "0003", "nowhere"], each, [none] * 3, [none] * 3)
    found, skipped = retrieval(encoder, gnd, folder, size=32)
    assert sorted(Path(path).name for path in skipped) == ["gone.jpg", "nowhere.jpg"]
    assert found[0].mean_ap == pytest.approx(100), "each query is its own image"
    assert found[0].queries == 2
    with pytest.raises(DinoError, match="none of the 9"):
        retrieval(encoder, gnd, tmp_path / "elsewhere", size=32)
