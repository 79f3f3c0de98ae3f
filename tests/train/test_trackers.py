from __future__ import annotations

import json
import sqlite3
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL
from PIL import Image

from dinocli.core.errors import DinoError
from dinocli.data.sources.open import image_folder
from dinocli.method.preset import load_preset
from dinocli.train import trackers
from dinocli.train.plan import Plan
from dinocli.train.pretrain import pretrain
from dinocli.train.trackers import Guarded, Tracked

SETTINGS = {"backbone": {"name": "vit", "options": {"depth": 2}}, "seed": 0}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tracked:
    """A run folder with a picture, and no trackers' services."""
    for name in ("WANDB_API_KEY", "WANDB_PROJECT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "TRACKIO_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    (tmp_path / "runs" / "tiny-1").mkdir(parents=True)
    Image.fromarray(np.full((4, 6, 3), 200, np.uint8)).save(tmp_path / "runs" / "tiny-1" / "p.jpg")
    return Tracked(tmp_path / "runs" / "tiny-1", SETTINGS)


def track(name: str, run: Tracked, *steps: int) -> list[str]:
    """Log two figures per step and a picture, and return the notes."""
    notes: list[str] = []
    tracker = Guarded(name, run, notes.append)
    for step in steps:
        tracker.write({"step": step, "dino/kl": step / 10})
    tracker.picture("attention", run.folder / "p.jpg", steps[-1])
    tracker.picture("missing", run.folder / "none.jpg", steps[-1])
    tracker.close()
    return notes


def test_tensorboard_gets_figures_and_pictures(run: Tracked) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert track("tensorboard", run, 1, 2, 3) == []
    assert track("tensorboard", Tracked(run.folder, SETTINGS, 2), 3, 4) == []
    events = accumulator.EventAccumulator(str(run.folder / "tensorboard")).Reload()
    assert [(e.step, round(e.value, 4)) for e in events.Scalars("dino/kl")] == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)]
    assert {(e.step, e.width, e.height) for e in events.Images("attention")} == {(4, 6, 4)}


def test_wandb_stores_a_run_offline_and_continues_it(run: Tracked) -> None:
    pytest.importorskip("wandb")
    assert track("wandb", run, 1, 2) == []
    assert track("wandb", Tracked(run.folder, SETTINGS, 2), 3) == []
    stored = sorted((run.folder / "wandb").glob("offline-run-*"))
    (id_,) = {path.name.rpartition("-")[2] for path in stored}
    assert id_ == json.loads((run.folder / "trackers.json").read_text())["wandb"]
    assert all(list(path.glob("*.wandb")) for path in stored)
    assert list((run.folder / "wandb").glob("offline-run-*/files/media/images/attention*"))


@pytest.mark.slow  # MLflow creates its tables one migration at a time
def test_mlflow_keeps_a_database_in_the_run_folder(run: Tracked) -> None:
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    assert track("mlflow", run, 1, 2) == []
    assert track("mlflow", Tracked(run.folder, SETTINGS, 2), 3) == []
    with sqlite3.connect(run.folder / "mlflow.db") as database:
        assert database.execute("select name, status from runs").fetchall() == [("tiny-1", "FINISHED")]
        found = database.execute("select step, value from metrics where key = 'dino/kl' order by step").fetchall()
        assert found == [(1, 0.1), (2, 0.2), (3, 0.3)]
        assert ("backbone.options.depth", "2") in database.execute("select key, value from params").fetchall()
    assert list((run.folder / "mlruns").rglob("pictures/p.jpg"))


def test_trackio_stores_a_run_on_this_machine(run: Tracked, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("trackio")
    assert track("trackio", run, 1, 2) == []
    assert capsys.readouterr().out == "", "standard output is for data"
    with sqlite3.connect(tmp_path / "trackio" / "dinocli.db") as database:
        rows = database.execute("select step, metrics from metrics order by step").fetchall()
    figures = [(step, json.loads(text)) for step, text in rows]
    assert [(step, values["dino/kl"]) for step, values in figures if "dino/kl" in values] == [(1, 0.1), (2, 0.2)]
    assert list((tmp_path / "trackio").rglob("*.png")) + list((tmp_path / "trackio").rglob("*.jpg"))


class Broken:
    """Tracker that fails at its second figure."""

    def __init__(self, run: Tracked) -> None:
        self.calls: list[str] = []

    def write(self, figures: Any) -> None:
        self.calls.append("write")
        print("chatter")
        if len(self.calls) > 1:
            raise ConnectionError("no route to host\nsecond line")

    def picture(self, name: str, path: Path, step: int) -> None:
        raise AssertionError("a tracker that failed is not used again")

    close = picture


def test_a_failure_is_one_warning_and_ends_the_tracking_only(
    run: Tracked, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(trackers._CLASSES, "wandb", Broken)
    assert track("wandb", run, 1, 2, 3) == ["warning: --log wandb stops here, and training continues: no route to host"]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_missing_package_is_an_error_with_its_extra(run: Tracked, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DinoError, match=f"--log {name} needs the package {name}") as error:
        Guarded(name, run, lambda line: None)
    assert error.value.hint == f"pip install 'dinocli[{name}]'"


def test_a_new_run_in_an_old_folder_has_a_new_id(run: Tracked) -> None:
    first = run.id("wandb")
    assert Tracked(run.folder, SETTINGS, 5).id("wandb") == first
    assert Tracked(run.folder, SETTINGS).id("wandb") != first
    (run.folder / "trackers.json").write_text("torn")
    assert Tracked(run.folder, SETTINGS, 5).id("wandb") not in ("", first)


def test_a_run_sends_its_figures_and_pictures(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, Any]] = []

    class Seen:
        def __init__(self, run: Tracked) -> None:
            seen.append(("open", (run.folder.name, run.step, run.settings["training"]["batch_size"])))

        def write(self, figures: Any) -> None:
            seen.append(("write", figures["step"]))

        def picture(self, name: str, path: Path, step: int) -> None:
            assert path.is_file()
            seen.append(("picture", name))

        def close(self) -> None:
            seen.append(("close", None))

    monkeypatch.setitem(trackers._CLASSES, "wandb", Seen)
    monkeypatch.chdir(tmp_path)
    preset = load_preset("tiny-dino", SMALL)
    plan = Plan(
        "tiny",
        preset,
        image_folder(images),
        2,
        Path("run"),
        torch.device("cpu"),
        0,
        None,
        report=True,
        trackers=("wandb",),
    )
    pretrain(plan, lambda progress: None)
    assert seen[0] == ("open", ("run", 0, 4))
    assert [step for kind, step in seen if kind == "write"] == [0, 1, 2]
    pictures = [name for kind, name in seen if kind == "picture"]
    assert pictures[-1] == "curves" and {"attention", "neighbours"} <= set(pictures)
    assert seen[-1] == ("close", None)
