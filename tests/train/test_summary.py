from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import SMALL, write_images

from dinocli.core.errors import DinoError
from dinocli.core.runs import held, is_held
from dinocli.data.sources.open import image_folder
from dinocli.method.preset import load_preset
from dinocli.train.plan import Plan
from dinocli.train.pretrain import pretrain
from dinocli.train.summary import best_of, list_runs


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of two steps of eight."""
    monkeypatch.chdir(tmp_path)
    source = image_folder(write_images(tmp_path / "images", 9, size=8))
    preset = load_preset("tiny-dino", [*SMALL, "training.epochs=2"])
    plan = Plan("tiny", preset, source, 2, Path("runs/tiny-1"), torch.device("cpu"), 0, None)
    pretrain(plan, lambda progress: None)
    return Path("runs")


def log(run: Path, *values: dict[str, float]) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in values)


def test_a_run_is_summarized_from_its_state_and_its_metrics(runs: Path, tmp_path: Path) -> None:
    (run,) = list_runs([runs])
    lines = [json.loads(line) for line in (runs / "tiny-1" / "metrics.jsonl").read_text().splitlines()]
    assert (run.folder, run.preset, run.images) == (runs / "tiny-1", "tiny-dino", 9)
    assert run.where == str(tmp_path / "images")
    assert (run.step, run.steps, run.condition) == (2, 8, "stopped")
    assert run.loss == pytest.approx(lines[-1]["loss"]) and run.knn is None and best_of([run]) is None
    assert run.written == pytest.approx((runs / "tiny-1" / "ckpt.safetensors").stat().st_mtime, abs=5)


def test_the_best_run_has_the_highest_accuracy_of_its_weights(runs: Path) -> None:
    first = runs / "tiny-1"
    log(first, {"step": 3, "loss": 2.0, "knn": 50.0}, {"step": 4, "loss": float("nan"), "knn": 40.0})
    (summary,) = list_runs([first])
    assert (summary.knn, summary.knn_step, summary.loss, summary.step) == (40.0, 4, 2.0, 4), "the last weights are kept"
    (first / "best.safetensors").write_bytes(b"")
    assert list_runs([first])[0].knn_step == 3, "the best weights are kept"
    others = [replace(summary, knn=knn, folder=Path(f"{knn}")) for knn in (None, 41.0, 40.5)]
    best = best_of([summary, *others])
    assert best is not None and best.knn == 41.0


def test_running_finished_and_corrupt_runs_are_recognised(runs: Path) -> None:
    run = runs / "tiny-1"
    assert not is_held(run)
    with held(run):
        assert is_held(run) and list_runs([run])[0].condition == "running"
    assert list_runs([run])[0].condition == "stopped"
    for state in (run / "state").glob("*/state.json"):
        state.write_text("{")
    summary = list_runs([run])[0]
    assert (summary.condition, summary.preset, summary.images, summary.steps) == ("corrupt", "tiny-dino", None, None)


def test_a_finished_run_has_done_all_steps(runs: Path, tmp_path: Path) -> None:
    preset = load_preset("tiny-dino", [*SMALL, "training.epochs=2", "about.recipe=mine"])
    source = image_folder(tmp_path / "images")
    pretrain(Plan("x", preset, source, 8, runs / "mine", torch.device("cpu"), 0, None), lambda progress: None)
    os.utime(runs / "mine" / "ckpt.safetensors", (2e9, 2e9))
    listed = list_runs([runs, runs / "mine"])
    assert [run.folder.name for run in listed] == ["mine", "tiny-1"], "each once, the last written first"
    assert (listed[0].condition, listed[0].preset) == ("finished", "mine")


def test_places_without_runs_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x" / "y").mkdir(parents=True)
    with pytest.raises(DinoError, match="x holds no run"):
        list_runs([tmp_path / "x"])
    with pytest.raises(DinoError, match="nowhere does not exist; expected a run"):
        list_runs([tmp_path / "nowhere"])
    (tmp_path / "file").write_text("")
    with pytest.raises(DinoError, match="file is a file; expected a run"):
        list_runs([tmp_path / "file"])
