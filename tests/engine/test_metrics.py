from __future__ import annotations

import json
import time
from pathlib import Path

from dinocli.engine.metrics import Metrics, Pace


def test_every_line_is_valid_json_even_with_a_loss_of_nan(tmp_path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.write({"step": 1, "loss": 2.5})
    metrics.write({"step": 2, "loss": float("nan"), "grad_norm": float("inf")})
    lines = [json.loads(line, parse_constant=lambda word: 1 / 0) for line in metrics.path.read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 2.5}, {"step": 2, "loss": "nan", "grad_norm": "inf"}]


def test_pace_counts_since_the_last_reading() -> None:
    pace = Pace()
    pace.add(10)
    time.sleep(0.02)
    rate, waiting = pace.look(0.01)
    assert 0 < rate < 500
    assert 0 < waiting < 0.5
    assert pace.look(0.01) == (0, 0)


def test_corrupt_and_later_lines_are_dropped_on_resuming(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": ' + "[" * 100_000 + '\n{"st\n[]\n{"step": 9}\n')
    Metrics(path, 3)
    assert path.read_text() == '{"step": 1}\n'
