from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from dinocli.core.errors import DinoError
from dinocli.evals.predictions import check_predictions_file, joined, predict, write_predictions

LOGITS = np.log(np.array([[0.7, 0.2, 0.1], [0.3, 0.3, 0.4], [0.1, 0.6, 0.3], [0.5, 0.3, 0.2]]))
TRUTH = np.array([0, 0, 1, 2])
NAMES = ["a/1.jpg", "a/2, or 3.jpg", 'b/"x".jpg', "c/\udce9.jpg"]


def test_confidences_are_the_probabilities_of_the_predicted_classes() -> None:
    found = predict(NAMES, TRUTH, LOGITS, 2.0)
    assert found.predicted.tolist() == [0, 2, 1, 0]
    assert found.uncalibrated == pytest.approx([0.7, 0.4, 0.6, 0.5])
    roots = np.sqrt(np.exp(LOGITS))
    assert found.confidence == pytest.approx((roots / roots.sum(1, keepdims=True)).max(1))
    assert found.correct.tolist() == [True, False, True, False]
    assert (found.percent(1), found.percent(2), found.percent(3)) == (50, 75, 100)
    assert found.macro == pytest.approx(50), "of three classes: half, all and none"
    assert found.interval.low < 50 < found.interval.high


def test_parts_join_to_the_whole() -> None:
    whole = predict(NAMES, TRUTH, LOGITS, 1.5)
    parts = joined([predict(NAMES[i : i + 2], TRUTH[i : i + 2], LOGITS[i : i + 2], 1.5) for i in (0, 2)])
    assert parts.names == NAMES
    assert parts.ranks.tolist() == whole.ranks.tolist()
    assert parts.confidence.tolist() == whole.confidence.tolist()
    assert parts.errors == whole.errors


def test_a_file_has_one_row_per_image_whatever_its_name(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    for _ in range(2):  # a file of predictions may be replaced
        check_predictions_file(path)
        write_predictions(path, predict(NAMES, TRUTH, LOGITS), ["cat", "dog", "owl"])
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["image", "class", "predicted", "confidence"]
    assert [row[0] for row in rows[1:]] == NAMES
    assert rows[2][1:] == ["cat", "owl", "0.400000"]


def test_another_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("image,class\n")
    with pytest.raises(DinoError, match="holds no predictions") as error:
        check_predictions_file(tmp_path / "labels.csv")
    assert "labels-predictions.csv" in error.value.hint
