from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinocli.apps.anomaly.detect import Scored
from dinocli.apps.anomaly.evaluate import evaluate, read_truth
from dinocli.core.errors import DinoError


def scored(image: str, score: float, distances: list[list[float]] | None = None) -> Scored:
    return Scored(image, score, 0, np.array(distances or [[score] * 2] * 2, np.float32))


def named(*names: str) -> dict[str, Path]:
    return {f"test/{name}.png": Path(name) for name in names}


def save(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values.astype(np.uint8) * 255).save(path)


@pytest.mark.parametrize(
    ("place", "good", "expected"), [("x", None, "good"), ("x", "dent", "dent"), ("data/train/dent", None, "dent")]
)
def test_the_normal_class_is_named_or_found(place: str, good: str | None, expected: str) -> None:
    names = named("dent/1", "good/1") if expected == "good" or good else named("dent/1", "hole/1")
    assert read_truth(names, place, good, None).normal == expected


def test_without_a_normal_class_or_class_folders_there_is_no_auroc_of_photos() -> None:
    truth = read_truth(named("a/1", "b/1"), "x", None, None)
    assert (truth.normal, truth.labels) == (None, {"test/a/1.png": "a", "test/b/1.png": "b"})
    assert read_truth(named("1", "b/1"), "x", None, None).labels == {}
    result = evaluate([scored("test/a/1.png", 1)], truth)
    assert (result.images, result.pixels, result.by_class) == (None, None, {})
    with pytest.raises(DinoError, match="--good c is no class of the test photos; they have the classes a, b"):
        read_truth(named("a/1", "b/1"), "x", "c", None)


def test_classes_are_scored_together_and_each(tmp_path: Path) -> None:
    truth = read_truth(named("good/1", "good/2", "dent/1", "hole/1"), "x", None, None)
    scores = {"good/1": 0.1, "good/2": 0.3, "dent/1": 0.2, "hole/1": 0.4}
    result = evaluate([scored(f"test/{name}.png", score) for name, score in scores.items()], truth)
    assert result.by_class == {"dent": 50, "hole": 100}
    assert result.images == 75


def test_pixels_are_scored_by_masks_and_normal_photos_have_none(tmp_path: Path) -> None:
    mask = np.zeros((512, 512), bool)
    mask[:256, 256:] = True
    save(tmp_path / "dent" / "1_mask.png", mask)
    save(tmp_path / "good" / "1.png", np.ones((8, 8)))  # a mask of the object, not of a defect
    truth = read_truth(named("good/1", "dent/1", "dent/2"), "x", None, tmp_path)
    assert truth.masks["test/dent/1.png"].shape == (256, 256)
    assert truth.masks["test/dent/1.png"].mean() == 0.25 and not truth.masks["test/good/1.png"].any()
    assert list(truth.skipped) == ["test/dent/2.png"]
    hot = [[0, 1], [0, 0]]
    photos = [scored("test/good/1.png", 0, [[0, 0], [0, 0]]), scored("test/dent/1.png", 1, hot)]
    best = evaluate(photos, truth).pixels
    assert best is not None and best > 95
    worst = evaluate([photos[0], scored("test/dent/1.png", 1, [[2, 0], [2, 2]])], truth).pixels
    assert worst is not None and worst < 51
    save(tmp_path / "other" / "9.png", mask)
    with pytest.raises(DinoError, match="has the name of a test photo"):
        read_truth(named("u", "v"), "x", None, tmp_path / "other")


def test_masks_alone_tell_defects(tmp_path: Path) -> None:
    for name, values in {"1": np.zeros((8, 8)), "2": np.eye(8)}.items():
        save(tmp_path / f"{name}.png", values)
    truth = read_truth(named("1", "2"), "x", None, tmp_path)
    assert truth.defective == {"test/1.png": False, "test/2.png": True}
    assert evaluate([scored("test/1.png", 0.1), scored("test/2.png", 0.2)], truth).images == 100
