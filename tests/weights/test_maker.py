from __future__ import annotations

from pathlib import Path

import pytest

from dinocli.features.store import Provenance
from dinocli.weights.maker import checkpoints_of


def write(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def test_the_run_comes_before_a_link_that_may_have_moved_to_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = Provenance("ckpt.safetensors", "0", "cls", 1, 8, "d", run="runs/tiny-1")
    assert checkpoints_of(made, tmp_path) == []
    for run in ("tiny-1", "tiny-2"):
        write(tmp_path / "runs" / run / "ckpt.safetensors")
    (tmp_path / "ckpt.safetensors").symlink_to("runs/tiny-2/ckpt.safetensors")
    assert checkpoints_of(made, tmp_path) == ["runs/tiny-1/ckpt.safetensors", "ckpt.safetensors"]


def test_places_beside_the_file_are_found_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "project" / "runs" / "tiny-1" / "ckpt.safetensors")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    made = Provenance("runs/tiny-1", "0", "cls", 1, 8, "d", run="runs/tiny-1")
    beside = Path("..") / "project"
    assert checkpoints_of(made, beside) == ["../project/runs/tiny-1/ckpt.safetensors", "../project/runs/tiny-1"]


def test_a_released_model_needs_no_file(tmp_path: Path) -> None:
    assert checkpoints_of(Provenance("timm:x", "0", "cls", 1, 8, "d"), tmp_path) == ["timm:x"]
