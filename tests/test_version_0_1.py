"""Files that version 0.1 wrote still load: a run resumes, a checkpoint encodes, features are compared."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinocli.cli import main

FILES = Path(__file__).parent / "fixtures" / "v0_1"
# As the run was started.
SETTINGS = (
    "backbone.options={img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2}",
    "heads.dino.prototypes=16",
    "heads.dino.hidden=16",
    "heads.dino.bottleneck=8",
    "views.global_1.size=16",
    "views.global_2.size=16",
    "views.local.size=8",
    "training.batch_size=4",
    "training.steps_per_epoch=4",
    "optimizer.lr.warmup_epochs=0",
    'losses.dino.targets.temperature={kind="constant", value=0.04}',
)


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the run of version 0.1, stopped at step 3, and with its images."""
    shutil.copytree(FILES / "run", tmp_path / "run")
    shutil.copy(tmp_path / "run" / "state" / "3" / "ckpt.safetensors", tmp_path / "run")
    (tmp_path / "features").mkdir()
    shutil.copy(FILES / "features.safetensors", tmp_path / "features" / "all.safetensors")
    for kind in range(2):
        (tmp_path / "images" / str(kind)).mkdir(parents=True)
        for i in range(4):
            noise = np.random.default_rng(10 * kind + i).integers(0, 256, (24, 24, 3), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / "images" / str(kind) / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def dino(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[str, str]:
    monkeypatch.setattr(sys, "argv", ["dino", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    out, err = capsys.readouterr()
    assert not stopped.value.code, err
    return out, err


def test_a_run_resumes(written: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    common = ("--preset", "tiny-dino", "--epochs", "2", "--workers", "0", "--no-report", *settings)
    _, err = dino(monkeypatch, capsys, "pretrain", "images", "--out", "run", *common)
    assert "from step 3 of 8" in err
    lines = [json.loads(line) for line in (written / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 8
    assert {folder.name for folder in (written / "run" / "state").iterdir()} == {"3", "8"}


def test_a_checkpoint_gives_the_features_that_were_stored(
    written: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import dinocli

    stored = dinocli.read_features("features/all.safetensors")
    dino(monkeypatch, capsys, "extract", "run", "images", "--out", "again", "--workers", "0", "--device", "cpu")
    again = dinocli.read_features("again/all.safetensors")
    assert list(again.paths) == list(stored.paths)
    # The file was written in the precision of its machine: bfloat16 has eight bits.
    np.testing.assert_allclose(again.values[:], stored.values[:], atol=0.05)


def test_features_are_classified(
    written: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = dino(monkeypatch, capsys, "knn", "--features", "features", "--k", "1", "--json")
    assert json.loads(out)["scores"][0]["top1"] == pytest.approx(62.5), "five of eight, as version 0.1 printed"
