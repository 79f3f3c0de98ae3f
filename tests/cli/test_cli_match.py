"""`dino match --point` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import write_images
from PIL import Image
from test_cli import SMALL, Dino, dino  # noqa: F401  a fixture

A, B = "images/0000.png", "images/0001.png"


@pytest.fixture
def trained(dino: Dino, tmp_path: Path) -> Dino:  # noqa: F811
    write_images(tmp_path / "images", 4, 32)
    dino("pretrain", "images", "--preset", "tiny", *SMALL, "--steps", "0", "--no-report")
    return dino


def test_a_point_is_compared_with_both_photos(trained: Dino) -> None:
    line = ["match", A, B, "--point", "4,20", "--short-side", "32", "--device", "cpu"]
    done = trained(*line)
    assert done.stderr.splitlines()[-2] == "results saved to matches/0000-0001-similarity.png"
    one = Image.open("matches/0000-0001-similarity.png")
    told = json.loads(trained(*line, "--point", "30,2", "--json").stdout)
    assert [(p["x_a"], p["y_a"]) for p in told["points"]] == [(4, 20), (30, 2)]
    assert all(-1 <= p["cosine"] <= 1 and 0 <= p["x_b"] < 32 for p in told["points"])
    assert Image.open(told["picture"]).height > 1.8 * one.height
    [same] = json.loads(trained(*[*line[:2], A, *line[3:]], "--json").stdout)["points"]
    assert (same["x_b"], same["y_b"], same["cosine"]) == (4, 20, pytest.approx(1, abs=1e-3))


@pytest.mark.parametrize(
    ("point", "code", "message", "hint"),
    [
        ("40,2", 1, "--point 40,2 is outside images/0000.png, which has 32x32 pixels", "use --point 16,16"),
        ("-1,2", 1, "--point -1,2 is outside", "use --point 16,16"),
        ("4", 2, "--point 4 is not valid; expected x and y in pixels", "--point 120,80"),
        ("nan,2", 1, "--point nan,2 is outside", "--point 16,16"),
    ],
)
def test_a_wrong_point_is_an_error(trained: Dino, point: str, code: int, message: str, hint: str) -> None:
    error, said = trained("match", A, B, f"--point={point}", code=code).stderr.strip().splitlines()[-2:]
    assert error.startswith("error: ") and message in error
    assert said.startswith("hint: ") and hint in said
    assert not Path("matches").exists()


def test_several_networks_need_points_and_have_a_row_each(trained: Dino) -> None:
    names = ("--checkpoint", "runs/tiny-1", "--checkpoint", "untrained:tiny")
    line = ["match", A, B, "--short-side", "32", "--device", "cpu", *names]
    assert "hint: remove one, or compare them with --point X,Y" in trained(*line, code=2).stderr
    found = json.loads(trained(*line, "--point", "4,20", "--json").stdout)["points"]
    assert [one["checkpoint"] for one in found] == ["runs/tiny-1", "untrained:tiny"]
    assert "untrained:tiny" in trained(*line, "--point", "4,20").stdout
