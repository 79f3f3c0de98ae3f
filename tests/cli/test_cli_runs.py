from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import SMALL, write_images
from typer.testing import CliRunner

from dinocli.cli import app
from dinocli.core.errors import DinoError


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two runs of a step each."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    write_images(tmp_path / "images", 9, size=8)
    small = [word for setting in SMALL for word in ("--set", setting)]
    for name in ("one", "two"):
        words = [
            "pretrain",
            "images",
            "--preset",
            "tiny",
            *small,
            "--steps",
            "1",
            "--out",
            f"runs/{name}",
            "--no-report",
        ]
        result = CliRunner().invoke(app, [*words, "--workers", "0", "--device", "cpu"], catch_exceptions=False)
        assert result.exit_code == 0
    return tmp_path / "runs"


def test_runs_are_listed_and_the_best_is_named(runs: Path) -> None:
    result = CliRunner().invoke(app, ["runs", "--best"])
    assert isinstance(result.exception, DinoError)
    assert "none of the 2 runs has a k-NN accuracy" in result.exception.message
    assert result.exception.hint == "dino compare runs/two runs/one --on DATA"
    for name, knn in (("one", 41.5), ("two", 40.0)):
        with (runs / name / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 1, "knn": knn}) + "\n")
    shown = CliRunner().invoke(app, ["runs"], catch_exceptions=False)
    assert "tiny, 9 images" in shown.stdout and "step 1 of 32, loss" in shown.stdout and "stopped" in shown.stdout
    assert "41.5 best" in shown.stdout and max(map(len, shown.stdout.splitlines())) <= 80
    assert "best: runs/one, k-NN 41.5 % at step 1" in shown.stderr
    assert CliRunner().invoke(app, ["runs", "--best"]).stdout == "runs/one\n"
    found = json.loads(CliRunner().invoke(app, ["runs", "runs/two", "--json"]).stdout)
    assert found["best"] == "runs/two" and found["runs"][0]["knn"] == 40.0 and found["runs"][0]["age"] < 600
