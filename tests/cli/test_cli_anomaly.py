"""`dino anomaly` from the command line."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_cli import SMALL, Dino, dino  # noqa: F401  a fixture


def write_parts(folder: Path, count: int, *, dented: bool = False, masks: Path | None = None) -> None:
    """Write gray photos, with a bright spot if they are dented, and the masks of the spots."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(count)
    for i in range(count):
        pixels, mask = rng.integers(110, 140, (32, 48, 3), dtype=np.uint8), np.zeros((32, 48), np.uint8)
        if dented:
            pixels[8:20, 20:36] = (250, 60, 20)
            mask[8:20, 20:36] = 255
        Image.fromarray(pixels).save(folder / f"{i:03}.png")
        if masks:
            masks.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(masks / f"{i:03}_mask.png")


@pytest.fixture
def parts(dino: Dino, tmp_path: Path) -> Dino:  # noqa: F811
    write_parts(tmp_path / "parts" / "good", 12)
    write_parts(tmp_path / "test" / "good", 5)
    write_parts(tmp_path / "test" / "dent", 6, dented=True, masks=tmp_path / "masks" / "dent")
    dino("pretrain", "parts", "--preset", "tiny", "--steps", "1", "--no-report", *SMALL)
    return dino


def test_defects_are_found_scored_and_drawn(parts: Dino) -> None:
    line = ["anomaly", "parts", "--test", "test", "--truth", "masks", "--short-side", "32", "--device", "cpu"]
    done = parts(*line)
    assert done.stderr.splitlines()[-2] == (
        "results saved to anomalies/bank.safetensors, anomalies/anomalies.png, anomalies/maps/, anomalies/scores.csv"
    )
    assert "AUROC" in done.stdout and "dent" in done.stdout
    with open("anomalies/scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["label"] for row in rows] == ["dent"] * 6 + ["good"] * 5
    assert len(list(Path("anomalies/maps").rglob("*.png"))) == 11
    told = json.loads(parts(*line, "--json").stdout)
    assert told["image_auroc"] == 100 and told["pixel_auroc"] > 90 and told["auroc_by_class"] == {"dent": 100}
    assert len(told["normal_scores"]) == 12 and len(told["images"]) == 11
    scores = {one["image"]: one["score"] for one in told["images"]}
    stored = parts("anomaly", "anomalies/bank.safetensors", "--test", "test/dent/000.png", "--json", "--out", "second")
    [one] = json.loads(stored.stdout)["images"]
    assert one["score"] == pytest.approx(scores["test/dent/000.png"], rel=1e-4)
    assert stored.stderr.splitlines()[-2] == "results saved to second/anomalies.png, second/maps/, second/scores.csv"
    assert "written by dino" in parts("pretrain", ".", "--preset", "tiny", "--dry-run", *SMALL).stderr
    only = parts("anomaly", "parts", "--short-side", "32", "--device", "cpu", "--out", "only")
    assert only.stderr.splitlines()[-2:] == [
        "results saved to only/bank.safetensors",
        "next: dino anomaly only/bank.safetensors --test IMAGES",
    ]


def test_mistakes_are_one_error_and_one_hint(parts: Dino) -> None:
    parts("anomaly", "parts", "--short-side", "32", "--device", "cpu")
    bank = "anomalies/bank.safetensors"
    Path("mine").mkdir()
    Path("mine/scores.csv").write_text("mine\n")
    Path("one").mkdir()
    Image.new("RGB", (32, 32)).save("one/1.png")
    for line, code, message, hint in (
        ("anomaly nowhere --test test", 1, "nowhere does not exist", ""),
        ("anomaly parts --test nowhere", 1, "nowhere does not exist", "check the path"),
        ("anomaly parts --truth masks", 2, "--truth needs --test", "add --test DIR"),
        (f"anomaly {bank}", 2, "is a stored bank, which needs --test", f"dino anomaly {bank} --test DIR"),
        (f"anomaly {bank} --test test --area 0.1", 2, "--area cannot be changed", "omit --area"),
        ("anomaly parts --test test --good fine", 1, "--good fine is no class", "name one of them"),
        ("anomaly parts --test test --truth one", 1, "has the name of a test photo", "as PNG"),
        ("anomaly parts --test test --out mine", 1, "holds no scores", "--out"),
        ("anomaly one --device cpu", 1, "has 1 readable photos", "folder of normal photos"),
        ("anomaly parts --coreset 2 --layer 9 --device cpu", 1, "9", ""),
        (f"extract {bank} parts", 1, "is a memory bank", "dino extract ckpt.safetensors parts"),
        (f"anomaly parts --checkpoint {bank}", 1, "is not a network", ""),
    ):
        error, said = parts(*line.split(), code=code).stderr.strip().splitlines()[-2:]
        assert error.startswith("error: ") and message in error, error
        assert said.startswith("hint: ") and hint in said, said
    assert Path("mine/scores.csv").read_text() == "mine\n"
    assert not Path("mine/bank.safetensors").exists()
    Path("runs/tiny-1/ckpt.safetensors").rename("moved.safetensors")
    Path("ckpt.safetensors").unlink()
    done = parts("anomaly", bank, "--test", "test", code=1)
    assert f"the checkpoint of {bank} is not here" in done.stderr
    assert parts("anomaly", bank, "--test", "test", "--checkpoint", "moved.safetensors").stdout
