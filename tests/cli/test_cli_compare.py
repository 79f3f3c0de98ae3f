from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import SMALL, write_images

from dinocli.cli import main
from dinocli.method.preset import load_preset
from dinocli.weights.checkpoint import write_checkpoint

FAST = ("--device", "cpu", "--workers", "0")


@pytest.fixture
def networks(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two checkpoints in the working directory."""
    torch.manual_seed(1)
    preset = load_preset("tiny-dino", SMALL)
    write_checkpoint(tmp_path / "other.safetensors", preset.network().weights(), preset, 9)
    monkeypatch.chdir(tmp_path)
    return ["start.safetensors", "other.safetensors"]


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["dino", "compare", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0), *capsys.readouterr()


def test_the_command_prints_a_table_and_a_verdict_and_writes_a_page(
    networks: list[str], labelled: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(monkeypatch, capsys, *networks, "--on", "labelled", *FAST)
    assert code == 0
    assert "linear probe, %" in out and "LiDAR" in out and "images/s" in out
    assert "other.safetensors" in out.splitlines()[-1] and "95 % interval" in out.splitlines()[-1]
    assert err.endswith("results saved to compare/compare.html\nnext: dino finetune DATA --from WEIGHTS\n")
    assert Path("compare/compare.html").is_file() and Path("compare/compare.png").is_file()
    code, out, err = run(
        monkeypatch, capsys, networks[0], *networks, "--on", "labelled", "--no-linear", "--json", *FAST
    )
    found = json.loads(out)
    assert [n["name"] for n in found["networks"]] == [networks[0], *networks]
    assert found["networks"][0]["differences"] == {} and found["networks"][0]["linear"] is None
    assert found["networks"][2]["differences"]["knn"]["verdict"] in ("better", "worse", "no difference")
    assert found["verdicts"][0].endswith("no difference: the weights are the same")
    assert err.count("features of ") == 3, "all features are reused"
    assert "encode" not in err


def test_unlabelled_images_give_figures_without_a_verdict(
    networks: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "flat", 5)
    code, out, _ = run(monkeypatch, capsys, *networks, "--on", "flat", *FAST)
    assert code == 0 and "effective rank" in out and "k-NN" not in out
    assert "no verdict without labels" in out


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        ("start.safetensors --on labelled", "one network: start.safetensors", "dino compare start.safetensors OTHER --on"),
        ("start.safetensors other.safetensors", "Missing option", "--on IMAGES"),
        ("start.safetensors labelled", "labelled is a folder of images; expected a checkpoint", "start.safetensors OTHER --device cpu --workers 0 --on labelled"),
        ("start.safetensors labelled --on labelled", "labelled is a folder of images", "name run folders"),
        ("start.safetensors nowhere.pth --on labelled", "nowhere.pth does not exist", ""),
        ("start.safetensors other.safetensors --on start.safetensors", "start.safetensors is a checkpoint", "--on IMAGES"),
        ("start.safetensors other.safetensors --on labelled --k 99", "--k 99 is larger than the 20 training", "--k 20"),
        ("start.safetensors other.safetensors --data labelled", "no option --data", "--on labelled"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_error_with_a_hint(
    words: str, message: str, hint: str, networks: list[str], labelled: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    code, out, err = run(monkeypatch, capsys, *words.split(), *FAST)
    lines = err.splitlines()
    assert code in (1, 2) and not out
    assert any(line.startswith("error: ") and message in line for line in lines), err
    assert any(line.startswith("hint: ") and hint in line for line in lines), err
    assert not Path("compare/compare.html").exists()
