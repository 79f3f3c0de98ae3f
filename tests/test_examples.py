"""The examples run, and do what they say."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import dinocli
from dinocli.data.sources.open import open_source
from dinocli.method.preset import load_preset
from dinocli.train.plan import Plan
from dinocli.train.pretrain import pretrain

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


@pytest.fixture
def untrained(example, tmp_path: Path) -> str:
    """An untrained `tiny`, made in this process to save the start of another."""
    example("features_in_python").draw(tmp_path / "for-the-run")
    preset = load_preset("tiny-dino", ["training.batch_size=4"])
    source = open_source(str(tmp_path / "for-the-run"))
    plan = Plan("tiny", preset, source, 0, tmp_path / "run", torch.device("cpu"), 0, None)
    return str(pretrain(plan, lambda progress: None).checkpoint)


def test_each_example_has_a_test() -> None:
    known = ["custom_backbone", "custom_loss", "features_in_python", "finetune_head", "pretrain_in_python", "ray_data"]
    assert known == NAMES


def test_features_in_python(example, untrained: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nearest = example("features_in_python").main(tmp_path, untrained)
    # Even untrained features separate red discs from blue squares.
    kinds = [name.split("-")[0] for name in nearest]
    assert kinds == ["disc", "square"] * 6
    assert "12 features of 96 numbers" in capsys.readouterr().out


def test_finetune_head(example, untrained: str, tmp_path: Path) -> None:
    assert example("finetune_head").main(tmp_path, untrained) >= 0.9
    assert (tmp_path / "head.pt").is_file()


def test_custom_backbone(example, tmp_path: Path) -> None:
    run = example("custom_backbone").main(tmp_path, steps=2)
    assert run.step == 2
    assert run.checkpoint.is_file()


def test_custom_loss(example, tmp_path: Path) -> None:
    loss = example("custom_loss")
    assert loss.variance_loss(torch.zeros(4, 3)).item() == pytest.approx(0.99, abs=1e-3)
    assert loss.variance_loss(torch.tensor([[2.0], [-2.0]])).item() == 0
    assert len(loss.main(tmp_path, steps=2)) == 2


def test_pretrain_in_python(example, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, shapes = example("pretrain_in_python").main(tmp_path, steps=2)
    assert run.step == 2
    assert shapes == [(8, 3, 48, 48)] * 2 + [(8, 3, 24, 24)] * 4
    assert "step 2: loss" in capsys.readouterr().out


@pytest.mark.slow
def test_ray_data(example, untrained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features that Ray's workers compute equal those of the encoder."""
    ray = pytest.importorskip("ray", reason='needs pip install "ray[data]"')
    paths = [str(EXAMPLES), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))  # Ray's workers import the example
    found = example("ray_data").main(tmp_path, untrained)
    ray.shutdown()
    assert sorted(Path(path).name for path in found) == sorted(path.name for path in (tmp_path / "photos").iterdir())
    encoder = dinocli.load(untrained, device="cpu")
    for path, features in found.items():
        np.testing.assert_allclose(features, encoder(path)[0].numpy(), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_as_a_script(name: str, tmp_path: Path) -> None:
    if name == "ray_data":
        pytest.importorskip("ray", reason='needs pip install "ray[data]"')
    done = subprocess.run([sys.executable, str(EXAMPLES / f"{name}.py")], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout
