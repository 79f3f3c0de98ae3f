"""`dino plot` from the command line, and lists of selected images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import write_images
from PIL import Image
from test_cli import SMALL, Dino, dino  # noqa: F401  a fixture


@pytest.fixture
def extracted(dino: Dino, tmp_path: Path) -> Dino:  # noqa: F811
    for name in ("cat", "dog"):
        write_images(tmp_path / "data" / name, 5, 16, seed=len(name))
    dino("pretrain", "data", "--preset", "tiny", "--steps", "1", "--no-report", *SMALL)
    dino("extract", "ckpt.safetensors", "data", "--workers", "0", "--device", "cpu")
    return dino


def test_features_are_plotted_as_a_picture_and_a_page(extracted: Dino) -> None:
    done = extracted("plot")
    assert done.stderr.splitlines()[-2] == "results saved to plot/plot.png, plot/plot.html"
    assert Image.open("plot/plot.png").width > 500
    assert '"names":["cat/0000.png"' in Path("plot/plot.html").read_text()
    Path("scores.csv").write_text("image,score\n" + "".join(f"data/cat/000{i}.png,{i}\n" for i in range(5)))
    options = ["--table", "scores.csv", "--color", "score", "--clusters", "3", "--thumbnails", "4"]
    done = extracted("plot", "features", *options, "--json")
    told = json.loads(done.stdout)
    assert told["columns"] == ["score", "class", "cluster"] and len(told["images"]) == 10
    assert {one["cluster"] for one in told["images"]} == {"0", "1", "2"}
    assert "note: 4 of the 10 images have a thumbnail" in done.stderr


def test_a_list_of_selected_images_is_input_of_other_commands(extracted: Dino, tmp_path: Path) -> None:
    # The page writes one absolute path per line.
    chosen = [tmp_path / "data" / name for name in ("cat/0001.png", "dog/0001.png", "dog/0002.png", "dog/0003.png")]
    Path("selected.txt").write_text("".join(f"{path}\n" for path in chosen))
    assert "4 images" in extracted("pretrain", "selected.txt", "--preset", "tiny", "--steps", "0", *SMALL).stderr
    drawn = extracted("segment", "selected.txt", "--device", "cpu", "--checkpoint", "runs/tiny-1").stdout.split()
    assert drawn == [f"segments/{path.parent.name}/{path.name}" for path in chosen]
    done = extracted("dedup", "--among", "selected.txt", "--json")
    assert json.loads(done.stdout)["images"] == 4 and "selected.txt: 4 images" in done.stderr
    extracted("knn", "--save", "--k", "1")
    told = json.loads(extracted("classify", "selected.txt", "--json", "--device", "cpu").stdout)
    assert [one["image"] for one in told["images"]] == [str(path) for path in chosen]


def test_mistakes_are_one_error_and_one_hint(extracted: Dino) -> None:
    Path("t.csv").write_text("image,x\nother.png,1\n")
    for line, message, hint in (
        ("plot data", "data is a folder of images", "dino extract"),
        ("plot --clusters 11", "--clusters 11 is larger than the 10 images", "--clusters 10"),
        ("plot --table t.csv", "--table t.csv names none of the images", "first column"),
        ("plot --color shape", "--color shape is no column; there are class, cluster", "--color class"),
        ("plot --out plot.png", "is named like a file", "--out plot"),
    ):
        error, said = extracted(*line.split(), code=1).stderr.strip().splitlines()[-2:]
        assert error.startswith("error: ") and message in error, error
        assert said.startswith("hint: ") and hint in said, said
