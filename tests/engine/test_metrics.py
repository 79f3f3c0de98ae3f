from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from dinocli.core.errors import DinoError
from dinocli.engine.metrics import Metrics, Pace, TensorBoard


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


def test_tensorboard_gets_the_same_metrics(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for begin, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        log = TensorBoard(tmp_path, begin)
        for step in steps:
            log.write({"step": step, "dino/kl": step + begin / 10})
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, round(e.value, 4)) for e in events.Scalars("dino/kl")] == [(1, 1), (2, 2), (3, 3.2), (4, 4.2)]


def test_a_missing_tensorboard_is_reported_with_the_command_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(DinoError, match="not installed") as error:
        TensorBoard(tmp_path)
    assert error.value.hint == "pip install 'dinocli[tensorboard]'"


def test_corrupt_and_later_lines_are_dropped_on_resuming(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": ' + "[" * 100_000 + '\n{"st\n[]\n{"step": 9}\n')
    Metrics(path, 3)
    assert path.read_text() == '{"step": 1}\n'
