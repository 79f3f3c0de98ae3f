from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from dinocli.cli import app
from dinocli.core.errors import DinoError

SMALL = ["--epochs", "2", "--batch-size", "4", "--device", "cpu", "--workers", "0", "--monitor-every", "2"]


def run(*words: object) -> tuple[str, str]:
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    return result.stdout, result.stderr


def test_a_fine_tuned_network_classifies_photos(
    start: Path, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out, said = run("finetune", labelled, "--from", start, *SMALL, "--predictions", "predictions.csv", "--json")
    printed = json.loads(out)
    assert 0 <= printed["interval"][0] <= printed["top1"] <= printed["interval"][1] <= 100
    assert "18 training images, 2 held out, 12 to test; 2 classes" in said
    assert said.count("results saved to") == 1
    assert "results saved to runs/finetune-1, predictions.csv, predictions-confusion.png\n" in said
    rows = (tmp_path / "predictions.csv").read_text().splitlines()
    assert len(rows) == 13
    assert len([row for row in rows[1:] if row.split(",")[1] == row.split(",")[2]]) == round(12 * printed["top1"] / 100)
    photos = sorted((labelled / "val/a").iterdir())
    answer, _ = run("classify", *photos, "--with", printed["classifier"], "--json", "--device", "cpu", "--workers", "0")
    classes = [each["classes"][0] if "classes" in each else each for each in json.loads(answer)["images"]]
    names = {row.split(",")[0]: row.split(",")[2:] for row in rows[1:]}
    for photo, found in zip(photos, classes, strict=True):
        predicted, confidence = names[f"a/{photo.name}"]
        assert found["class"] == predicted
        assert found["confidence"] == pytest.approx(float(confidence), abs=0.01), "as in the test"


def test_parts_and_activation_checkpointing_train_the_same_network(
    start: Path, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # Float32, and no random draws of the networks, which differ between parts. Mixing takes place before the split.
    settings = ["training.precision=float32", "backbone.drop_path=0", "losses.labels.mixup=0.5"]
    exact = [word for setting in settings for word in ("--set", setting)]
    found = []
    for name, more in (("whole", []), ("saving", ["--accumulate", 2, "--recompute"])):
        run("finetune", labelled, "--from", start, *SMALL, *exact, "--steps", 6, "--held-out", 0, "--out", name, *more)
        found.append(load_file(tmp_path / name / "ckpt.safetensors"))
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--from", "nowhere.pth"], "checkpoint nowhere.pth does not exist"),
        (["--from", "START", "--train", "half"], "--train half is not valid"),
        (["--from", "START", "--multi-label", "--few-shot", "2"], "--few-shot 2 needs one class per image"),
        (["--from", "START", "--predictions", "x.txt"], "is no .csv file"),
    ],
)
def test_wrong_input_is_one_error_before_anything_is_trained(
    words: list[str], message: str, start: Path, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [word.replace("START", str(start)) for word in words]
    result = CliRunner().invoke(app, ["finetune", str(labelled), *given, *SMALL])
    assert isinstance(result.exception, DinoError)
    assert message in result.exception.message
    assert not (tmp_path / "runs").exists()
