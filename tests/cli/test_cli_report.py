from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dinocli.cli import app
from dinocli.core.errors import DinoError
from dinocli.method.preset import load_preset


@pytest.fixture(autouse=True)
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs `one` and `two` in the working directory."""
    monkeypatch.chdir(tmp_path)
    for name, scale in (("one", 1.0), ("two", 2.0)):
        Path(name).mkdir()
        (Path(name) / "preset.json").write_text(load_preset("tiny").model_dump_json())
        lines = ({"step": i, "loss": scale * i, "dino/kl": scale, "lr": 0.1} for i in range(5))
        (Path(name) / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def invoke(*words: str) -> tuple[str, str]:
    result = CliRunner().invoke(app, ["report", *words], catch_exceptions=False)
    return result.stdout, result.stderr


def test_curves_of_runs_are_laid_over_each_other() -> None:
    out, err = invoke("one", "two")
    assert (
        "dino/kl" in out and "lr" not in out and err.endswith("results saved to report/report.html\nnext: dino runs\n")
    )
    assert Path("report/curves.png").is_file() and Path("report/report.html").is_file()
    found = json.loads(invoke("one", "two", "--value", "lr", "--out", "x", "--json")[0])
    assert found == {
        "runs": {"one": {"step": 4, "lr": 0.1}, "two": {"step": 4, "lr": 0.1}},
        "page": "x/report.html",
        "picture": "x/curves.png",
    }


def test_the_report_of_one_run_is_drawn_anew_in_its_folder() -> None:
    _, err = invoke("one")
    assert err.endswith("results saved to one/report.html\nnext: dino runs\n") and Path("one/curves.png").is_file()
    assert "Settings" in Path("one/report.html").read_text() and not Path("report").exists()
    before = Path("one/report.html").read_bytes()
    invoke("one", "--value", "loss", "--out", "x")
    assert Path("x/report.html").is_file() and Path("one/report.html").read_bytes() == before


def test_wrong_input_is_one_error_before_anything_is_written() -> None:
    for words, message in (
        (["nowhere", "one"], "nowhere has no logged values"),
        (["one", "two", "--value", "los"], "--value los is not logged"),
        (["one"] * 16, "16 runs; curves of at most 15"),
        (["one", "two", "--out", "s3://x/y"], "is an address"),
    ):
        result = CliRunner().invoke(app, ["report", *words])
        assert isinstance(result.exception, DinoError) and message in result.exception.message
        assert not Path("report").exists()
