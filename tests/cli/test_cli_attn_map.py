"""`dino attn-map` with points, masks, several networks, a stride and tiles."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL, write_images, write_run
from PIL import Image
from test_cli import Dino, dino  # noqa: F401  a fixture

PHOTO = "images/0000.png"
SIZE = ("--checkpoint", "run", "--short-side", "32", "--device", "cpu")


@pytest.fixture
def trained(dino: Dino, tmp_path: Path) -> Dino:  # noqa: F811
    write_images(tmp_path / "images", 3, 32)
    write_run(tmp_path, *SMALL)
    return dino


def test_points_of_a_photo_are_drawn_for_each_network(trained: Dino) -> None:
    line = ["attn-map", PHOTO, "--point", "4,20", "--point", "30,2", *SIZE]
    assert trained(*line).stdout == "attention/0000-similarity.png\n"
    one = Image.open("attention/0000-similarity.png").height
    more = ("--checkpoint", "untrained:run", "--json")
    [told] = json.loads(trained(*line, *more).stdout)
    assert [network["checkpoint"] for network in told["networks"]] == ["run", "untrained:run"]
    assert [(p["x"], p["y"]) for p in told["networks"][1]["points"]] == [(4, 20), (30, 2)]
    assert Image.open(told["picture"]).height > 2 * one
    assert "--point 40,2 is outside" in trained("attn-map", PHOTO, "--point", "40,2", *SIZE, code=1).stderr
    Image.new("RGB", (64, 32)).save("images/wide.png")
    said = trained("attn-map", "images", "--point", "40,2", *SIZE)
    assert said.stdout == "attention/wide-similarity.png\n" and "skipped images/0000.png: --point 40,2" in said.stderr


def test_masks_give_the_overlap_per_photo_and_its_mean(trained: Dino) -> None:
    Path("masks").mkdir()
    for i in (0, 1):
        Image.fromarray(np.tile(np.uint8([0, 255]).repeat(16), (32, 1))).save(f"masks/000{i}.png")
    line = ["attn-map", "images", "--masks", "masks", *SIZE, "--checkpoint", "untrained:tiny"]
    told = json.loads(trained(*line, "--json").stdout)
    scores = [[network["jaccard"] for network in image["networks"]] for image in told["images"]]
    assert [one["jaccard"] for one in told["mean"]] == pytest.approx(np.mean(scores, axis=0))
    assert np.shape(scores) == (2, 2) and told["skipped"] == {"images/0002.png": "no mask with its name in masks"}
    assert [image["networks"][0]["rows"] for image in told["images"]] == [4, 4]
    table = trained(*line)
    assert f"{told['mean'][0]['jaccard']:.3f}" in table.stdout and "skipped images/0002.png: no mask" in table.stderr
    Path("masks/0000.png").rename("masks/x.png"), Path("masks/0001.png").unlink()
    assert "none of 3 photos has a mask of its name in masks" in trained(*line, code=1).stderr


def test_a_stride_and_tiles_give_finer_maps_and_print_their_memory(trained: Dino) -> None:
    done = trained("attn-map", PHOTO, *SIZE, "--stride", "2", "--json")
    [network] = json.loads(done.stdout)[0]["networks"]
    assert (network["rows"], network["columns"]) == (13, 13)
    assert "at most 16,384 patches at once, in about 10 MB" in done.stderr
    write_images(Path("large"), 1, 96)
    done = trained("attn-map", "large", "--tile", "32", "--raw", "--json", "--checkpoint", "run")
    assert json.loads(done.stdout)[0]["networks"][0]["rows"] == 12, "the photo's own size"
    assert "at most 16 patches at once" in done.stderr
    reduced = trained("attn-map", "large", "--short-side", "1200", "--stride", "4", "--checkpoint", "run").stderr
    assert "note: large/0000.png was reduced to a short side of 5" in reduced and "--tile" in reduced
    for words, hint in ((["--stride", "3"], "--stride 4"), (["--tile", "33"], "--tile 32")):
        assert f"hint: {hint}" in trained("attn-map", PHOTO, *SIZE, *words, code=1).stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("images --film gif --point 1,2", "--point is for photos only"),
        ("images --film gif --stride 4", "--stride is for photos only"),
        ("images --film gif --checkpoint a --checkpoint b", "a second --checkpoint is for photos only"),
        ("x.png --point 1,2 --masks y", "--masks is for attention maps"),
        ("x.png --raw --checkpoint a --checkpoint b", "--raw writes the maps of one network"),
        ("x.png --point 1", "--point 1 is not valid"),
    ],
)
def test_options_that_do_not_fit_are_an_error(dino: Dino, words: str, message: str) -> None:  # noqa: F811
    said = dino("attn-map", *words.split(), code=2).stderr
    assert message in said and "hint: " in said
