from __future__ import annotations

import json
import time

from dinocli.engine.metrics import Metrics, Pace


def test_every_line_is_json_even_of_a_loss_that_is_no_number(tmp_path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.write({"step": 1, "loss": 2.5})
    metrics.write({"step": 2, "loss": float("nan"), "grad_norm": float("inf")})
    lines = [json.loads(line, parse_constant=lambda word: 1 / 0) for line in metrics.path.read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 2.5}, {"step": 2, "loss": "nan", "grad_norm": "inf"}]


def test_pace_counts_since_the_last_look() -> None:
    pace = Pace()
    pace.add(10)
    time.sleep(0.02)
    rate, waiting = pace.look(0.01)
    assert 0 < rate < 500
    assert 0 < waiting < 0.5
    assert pace.look(0.01) == (0, 0)
