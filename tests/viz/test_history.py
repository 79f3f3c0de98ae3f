from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from dinocli.engine.metrics import Metrics
from dinocli.viz.history import Curve, read_history, thinned


def written(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines))
    return path


def pairs(curve: Curve) -> list[tuple[float, float]]:
    return list(zip(curve.steps.tolist(), curve.values.tolist(), strict=True))


def test_logged_metrics_are_read_back(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.write({"step": 1, "loss": 5.5})
    metrics.write({"step": 2, "loss": math.nan, "dino/kl": math.inf})
    metrics.write({"step": 3, "loss": 4.5, "knn": 30})
    history = read_history(metrics.path)
    assert set(history) == {"loss", "dino/kl", "knn"}
    assert history["loss"].steps.tolist() == [1, 2, 3]
    assert history["loss"].finite.tolist() == [5.5, 4.5]
    assert math.isnan(history["loss"].values[1]) and history["dino/kl"].values.tolist() == [math.inf]
    assert pairs(history["knn"]) == [(3, 30)]


def test_a_missing_or_empty_file_gives_no_curves(tmp_path: Path) -> None:
    assert read_history(tmp_path / "metrics.jsonl") == {}
    assert read_history(written(tmp_path / "metrics.jsonl", "")) == {}


def test_truncated_and_invalid_lines_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        b'{"step": 1, "loss": 5}\n{"step": 2, "lo{"step": 3, "loss": 3}\n\0\0\0{"step": 4, "loss": 2}\n'
        b'[1]\n7\nnull\n\xff\n{"loss": 9}\n{"step": "x", "loss": 9}\n{"step": null}\n{"step": 5, "loss": 1, "lr'
    )
    assert pairs(read_history(path)["loss"]) == [(1, 5), (3, 3), (4, 2)]


def test_values_that_are_not_numbers_do_not_affect_others(tmp_path: Path) -> None:
    path = written(
        tmp_path / "m", '{"step": 1, "loss": 5, "note": "x"}', '{"step": 2, "loss": [1], "note": {"a": 1}, "lr": 0.5}'
    )
    history = read_history(path)
    assert history["loss"].finite.tolist() == [5]
    assert not len(history["note"].finite)


def test_a_run_resumed_from_an_earlier_step_replaces_later_values(tmp_path: Path) -> None:
    lines = [(10, 5), (20, 4), (30, 3), (20, 4.5), (25, 4.2)]
    path = written(tmp_path / "m", *(json.dumps({"step": s, "loss": v}) for s, v in lines), '{"step": 25, "knn": 40}')
    history = read_history(path)
    assert pairs(history["loss"]) == [(10, 5), (20, 4.5), (25, 4.2)]
    assert pairs(history["knn"]) == [(25, 40)]


@pytest.mark.parametrize("count", [1, 2, 299, 300, 301, 5000])
def test_a_thinned_curve_has_few_points_and_hides_no_spike(count: int) -> None:
    values = np.random.default_rng(0).random(count)
    values[count // 2] = 50
    few = thinned(Curve(np.arange(count, dtype=float), values), 300)
    assert len(few.steps) == min(300, count)
    assert few.high.max() == 50 and few.low.min() == values.min()
    assert (np.diff(few.steps) > 0).all() and (few.low <= few.mean).all() and (few.mean <= few.high).all()
    if count <= 300:
        np.testing.assert_array_equal(few.mean, values)
    else:
        sizes = np.diff(np.append(np.arange(300) * count // 300, count))
        np.testing.assert_allclose((few.mean * sizes).sum(), values.sum())


def test_a_point_without_a_finite_value_is_a_gap() -> None:
    few = thinned(Curve(np.arange(4.0), np.array([1, math.nan, math.inf, 3])), 2)
    assert few.mean.tolist() == [1, 3]
    few = thinned(Curve(np.arange(4.0), np.array([1, math.nan, math.inf, 3])), 4)
    assert few.mean[[0, 3]].tolist() == [1, 3] and np.isnan(few.high[1:3]).all()


def test_a_deeply_nested_line_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 2}\n{"step": ' + "[" * 100_000 + '\n{"step": 3, "loss": 4}\n'
    )
    assert read_history(tmp_path / "metrics.jsonl")["loss"].steps.tolist() == [1, 3]
