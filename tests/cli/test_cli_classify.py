"""Classifiers from the command line: saved by `dino linear` and `dino knn`, used by `dino classify`."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest
from conftest import write_images
from PIL import Image
from test_cli import SMALL, Dino, dino  # noqa: F401  a fixture

COLORS = {"dark": (40, 30, 60), "light": (200, 220, 190)}


def write_colored(folder: Path, counts: dict[str, int]) -> None:
    """Write images whose two classes differ in brightness."""
    for name, count in counts.items():
        for path in write_images(folder / name, count, 16, seed=count).iterdir():
            Image.blend(Image.open(path), Image.new("RGB", (16, 16), COLORS[name]), 0.8).save(path)


@pytest.fixture
def learned(dino: Dino, tmp_path: Path) -> Dino:  # noqa: F811
    """Extract features of a small labelled set; return the runner of commands."""
    write_colored(tmp_path / "data" / "train", {"dark": 20, "light": 20})
    write_colored(tmp_path / "data" / "val", {"dark": 8, "light": 6})
    dino("pretrain", "data/train", "--preset", "tiny", "--steps", "1", "--no-report", *SMALL)
    dino("extract", "ckpt.safetensors", "data", "--workers", "0", "--device", "cpu")
    return dino


@pytest.mark.parametrize("words", [["linear", "--epochs", "20"], ["knn", "--k", "3"]], ids=["linear", "knn"])
def test_a_saved_classifier_gives_the_predictions_of_the_evaluation(
    learned: Dino, tmp_path: Path, words: list[str]
) -> None:
    done = learned(*words, "--save", "--predictions", "test.csv")
    assert done.stderr.splitlines()[-2:] == [
        "results saved to classifier.safetensors, test.csv, test-confusion.png",
        "next: dino classify IMAGES --with classifier.safetensors",
    ]
    assert "expected calibration error" in done.stderr
    assert "most often mistaken for" in done.stdout
    assert Image.open("test-confusion.png").width > 300
    told = json.loads(learned(*words, "--save", "--predictions", "test.csv", "--json").stdout)
    assert told["classifier"] == "classifier.safetensors"
    assert {one["name"]: one["images"] for one in told["per_class"]} == {"dark": 8, "light": 6}
    with open("test.csv", newline="") as file:
        tested = {row["image"]: row for row in csv.DictReader(file)}
    assert len(tested) == 14
    line = ["classify", "data/val", "--csv", "new.csv", "--sort-into", "sorted", "--device", "cpu"]
    done = learned(*line)
    assert done.stderr.splitlines()[-2] == "results saved to classify.png, new.csv, sorted/"
    with open("new.csv", newline="") as file:
        new = {row["image"].removeprefix("data/val/"): row for row in csv.DictReader(file)}
    assert {name: row["predicted"] for name, row in tested.items()} == {name: row["class"] for name, row in new.items()}
    for name, row in tested.items():  # features of bfloat16 depend on the batch
        assert float(new[name]["confidence"]) == pytest.approx(float(row["confidence"]), abs=0.02)
    correct = sum(row["class"] == row["predicted"] for row in tested.values())
    assert correct > 11
    assert len([path for path in Path("sorted").rglob("*.png") if path.is_symlink()]) == 14
    again = learned("doctor", ".", "--json").stdout
    assert json.loads(again), "links and pictures are recognised as output"
    both = json.loads(learned("classify", "data/val/dark/0000.png", "--top", "9", "--json", "--device", "cpu").stdout)
    [one] = both["images"]
    assert sorted(c["class"] for c in one["classes"]) == ["dark", "light"]
    assert sum(c["confidence"] for c in one["classes"]) == pytest.approx(1)


def test_the_checkpoint_is_found_by_its_weights(learned: Dino, tmp_path: Path) -> None:
    learned("linear", "--epochs", "2", "--save")
    learned("pretrain", "data/train", "--preset", "tiny", "--steps", "2", "--seed", "5", "--no-report", *SMALL)
    assert os.readlink("ckpt.safetensors") == "runs/tiny-2/ckpt.safetensors"
    photo = ("classify", "data/val/dark/0000.png", "--device", "cpu")
    assert json.loads(learned(*photo, "--json").stdout)["checkpoint"] == "runs/tiny-1/ckpt.safetensors"
    said = learned(*photo, "--checkpoint", "ckpt.safetensors", code=1).stderr.splitlines()
    assert "has other weights" in said[-2]
    assert "--checkpoint with the one it was trained with" in said[-1]
    Path("runs/tiny-1/ckpt.safetensors").rename("moved.safetensors")
    assert "has other weights" in learned(*photo, code=1).stderr, "only the other run is left"
    assert learned(*photo, "--checkpoint", "moved.safetensors").stdout
    Path("ckpt.safetensors").unlink()
    assert "the checkpoint of classifier.safetensors is not here" in learned(*photo, code=1).stderr


def test_folds_and_imbalance_are_printed(learned: Dino, tmp_path: Path) -> None:
    told = json.loads(learned("linear", "--folds", "2", "--epochs", "5", "--json", "--predictions", "cv.csv").stdout)
    assert (len(told["folds"]), told["images"]) == (2, 40)
    assert len(Path("cv.csv").read_text().splitlines()) == 41
    done = learned("linear", "--folds", "2", "--epochs", "5")
    assert "in 2 folds" in done.stdout
    assert "note: --folds uses the training split alone, not the 14 images of the test split" in done.stderr
    assert "standard deviation" in done.stderr
    assert "imbalanced" not in done.stderr
    write_colored(tmp_path / "few", {"dark": 40, "light": 12})
    learned("extract", "ckpt.safetensors", "few", "--out", "f", "--workers", "0", "--device", "cpu")
    for words in (["knn"], ["linear", "--epochs", "5"]):
        done = learned(*words, "--features", "f")
        assert "note: imbalanced classes: dark has 40 training images, light has 12" in done.stderr
        assert "95 % interval" in done.stdout and "macro %" in done.stdout
    assert "note: 4 images are few" in done.stderr


def test_mistakes_of_a_classifier_are_one_error_and_one_hint(learned: Dino, tmp_path: Path) -> None:
    learned("linear", "--epochs", "2", "--save")
    Path("torn").mkdir()
    Path("torn/x.jpg").write_text("torn")
    Path("labels.csv").write_text("mine")
    before = Path("ckpt.safetensors").read_bytes()
    for line, message, hint in (
        ("classify torn", "none of the photos can be read; torn/x.jpg", "name a photo"),
        ("classify nowhere.jpg", "nowhere.jpg does not exist", "check the path"),
        ("classify data/val --with none.safetensors", "none.safetensors does not exist", "dino linear --save"),
        ("classify data/val --with ckpt.safetensors", "ckpt.safetensors holds no classifier", "dino linear --save"),
        ("classify data/val --with features", "features is a folder", "dino linear --save"),
        ("classify classifier.safetensors", "is a classifier", "dino classify photo.jpg --with classifier.safetensors"),
        ("classify data/val --csv labels.csv", "holds no classified images", "labels-classes.csv"),
        ("classify data/val --sort-into data", "data is not empty", "--sort-into data-2"),
        ("classify data/val --out data/val/dark/0000.png", "is an input", "--out"),
        ("extract classifier.safetensors data", "is a classifier", "dino extract ckpt.safetensors data"),
        ("linear --save --out ckpt.safetensors", "would be overwritten", "use --out ckpt-classifier.safetensors"),
        ("knn --save --out c.pt", "c.pt is no .safetensors file", "--out c.safetensors"),
        ("knn --out c.safetensors", "has no effect without --save", "add --save"),
        ("linear --predictions labels.csv", "holds no predictions", "labels-predictions.csv"),
        ("knn --predictions x.json", "is no .csv file", "--predictions x.csv"),
        ("linear --folds 30", "--folds 30 is larger than the 20 images of the smallest class", "--folds 20"),
        ("linear --folds 3 --save", "--save needs a single one", "omit --folds"),
        ("linear --folds 3 --paper data", "--folds needs stored features", "omit --folds"),
    ):
        error, said = learned(*line.split(), code=1).stderr.strip().splitlines()[-2:]
        assert error.startswith("error: ") and message in error, error
        assert said.startswith("hint: ") and hint in said, said
    assert Path("labels.csv").read_text() == "mine"
    assert Path("ckpt.safetensors").read_bytes() == before
    said = learned("linear", "--save", "mine.safetensors", code=2).stderr
    assert "hint: dino linear --save --out mine.safetensors" in said


def test_the_papers_probe_can_be_saved_uncalibrated(learned: Dino) -> None:
    options = ["--blocks", "1", "--epochs", "1", "--batch-size", "8", "--workers", "0", "--device", "cpu"]
    done = learned("linear", "--paper", "data", *options, "--save")
    assert "confidences are not calibrated" in done.stderr
    assert "confidence not calibrated" in learned("classify", "data/val", "--device", "cpu").stderr
