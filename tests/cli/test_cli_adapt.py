from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dinocli.cli import app
from dinocli.core.errors import DinoError
from dinocli.method.preset import load_preset
from dinocli.weights import load, starting_point
from dinocli.weights.checkpoint import Weights, read_weights, write_checkpoint

OPTIONS = "{img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2}"
HEADS = {"prototypes": 16, "hidden": 16, "bottleneck": 8}


def test_the_command_prints_a_verdict_and_json(
    start: Path, images: Path, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    reads: list[Path] = []

    def read(path: Path, *which: Any) -> Weights:
        reads.append(path)
        return read_weights(path, *which)

    for module in (load, starting_point):
        monkeypatch.setattr(module, "read_weights", read)
    small = ["--epochs", "2", "--set", "training.steps_per_epoch=3", "--set", "views.locals=2", "--device", "cpu"]
    small += ["--workers", "0", "--batch-size", "4"]
    arguments = ["adapt", str(images), "--from", str(start), "--monitor", str(labelled), *small]
    result = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    assert reads == [start], "for the plan, the start and the verdict"
    printed = json.loads(result.stdout)
    assert printed["figures"]["knn"]["verdict"] in ("better", "no difference", "worse")
    assert (
        printed["figures"]["knn"]["low"] <= printed["figures"]["knn"]["difference"] <= printed["figures"]["knn"]["high"]
    )
    assert {"rank", "uniformity", "lidar"} <= printed["figures"].keys()
    assert "recipe: adapt-lora, --train lora" in result.stderr
    assert "verdict: " in result.stderr
    again = CliRunner().invoke(app, [*arguments, "--out", printed["checkpoint"].rpartition("/")[0]])
    assert "LiDAR" in again.stdout
    assert "is finished" in again.stderr


def test_options_that_save_memory_are_in_the_plan(start: Path, images: Path, tmp_path: Path) -> None:
    words = ["--accumulate", "2", "--recompute", "--batch-size", "4", "--device", "cpu", "--workers", "0", "--dry-run"]
    shown = CliRunner().invoke(app, ["adapt", str(images), "--from", str(start), *words], catch_exceptions=False).stdout
    assert "4 images, in 2 parts, activation checkpointing" in " ".join(shown.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--from", "nowhere.pth"], "checkpoint nowhere.pth does not exist"),
        (["--from", "START", "--train", "qlora"], "--train qlora is not valid"),
        (["--from", "START", "--monitor", "IMAGES/a"], "--monitor needs images in class folders"),
        (["--from", "START", "--train", "last-3"], "trained.blocks is 3; VisionTransformer has 2 blocks"),
        (["--from", "s3://bucket/x.pth"], "s3://bucket/x.pth"),
    ],
)
def test_wrong_input_is_one_error_before_anything_is_trained(
    arguments: list[str], message: str, start: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [a.replace("START", str(start)).replace("IMAGES", str(images)) for a in arguments]
    for more in ([], ["--dry-run"]):
        result = CliRunner().invoke(app, ["adapt", str(images), *given, "--device", "cpu", "--workers", "0", *more])
        assert isinstance(result.exception, DinoError)
        assert message in result.exception.message
        assert not list((tmp_path / "runs").glob("*/state/1"))


def test_lora_on_a_convolutional_network_is_refused(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = load_preset("resnet50", ["backbone={name='resnet18'}", *(f"heads.dino.{k}={v}" for k, v in HEADS.items())])
    write_checkpoint(tmp_path / "cnn.safetensors", made.network().weights(), made, 1)
    arguments = ["adapt", str(images), "--from", "cnn.safetensors", "--device", "cpu", "--workers", "0", "--dry-run"]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, DinoError)
    assert "'lora', which needs a transformer with blocks; ResNet has none" in result.exception.message
    assert CliRunner().invoke(app, [*arguments, "--train", "all"]).exit_code == 0
