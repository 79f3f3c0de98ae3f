from __future__ import annotations

import json
import re
from base64 import b64decode
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_images
from PIL import Image

from dinocli.apps.plot.columns import NONE, Column, named
from dinocli.apps.plot.page import colors_of, thumbnails_of, write_page
from dinocli.features.gallery import Gallery, open_gallery
from dinocli.features.store import Provenance
from dinocli.features.writer import write_features

NAMES = ["a/0000.png", "a/0001.png", "b/0000.png"]
POINTS = np.array([[0, 0], [4, 1], [2, 2]], np.float32)


def a_gallery(folder: Path, names: list[str] = NAMES) -> Gallery:
    for part, count in (("a", 2), ("b", 1)):
        write_images(folder / "data" / part, count, 16)
    provenance = Provenance("ckpt.safetensors", "0" * 16, "cls", 1, 16, str(folder / "data"))
    with write_features(folder / "features" / "all.safetensors", provenance, ["a", "b"]) as writer:
        writer.append(np.eye(3, dtype=np.float32), [0, 0, 1], names)
    return open_gallery(folder / "features")


def data_of(path: Path) -> tuple[str, dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    [found] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    return text, json.loads(found)


def test_the_page_holds_all_points_and_needs_no_network(tmp_path: Path) -> None:
    gallery = a_gallery(tmp_path)
    columns = [named("class", ["a", "a", None]), Column("score", [], np.array([0.5, np.nan, 2], np.float32))]
    small, skipped = thumbnails_of(gallery, [0, 2])
    assert not skipped
    write_page(tmp_path / "p.html", gallery, POINTS, columns, small, "run <1>", "3 images")
    text, data = data_of(tmp_path / "p.html")
    assert "run &lt;1&gt;" in text and "default-src 'none'" in text
    assert not re.search(r"https?://", text), "nothing is fetched"
    assert "$$" not in text and "${one.name}" in text
    xy = np.frombuffer(b64decode(data["points"]), "<u2").reshape(-1, 2).astype(int)
    assert xy[:, 0].tolist() == [0, 65535, 32768]
    assert np.ptp(xy[:, 1]) == pytest.approx(65535 / 2, abs=2), "one scale for both axes"
    assert xy[0, 1] > xy[2, 1], "y points down on a screen"
    assert data["names"] == NAMES and data["files"]
    assert [data["root"] + name for name in NAMES] == [str(tmp_path / "data" / name) for name in NAMES]
    assert [bool(one) for one in data["thumbnails"]] == [True, False, True]
    assert Image.open(BytesIO(b64decode(data["thumbnails"][0]))).size == (64, 64)
    kinds, numbers = data["columns"]
    assert (kinds["kinds"], kinds["colors"][1]) == (["a", NONE], [150, 150, 150])
    assert (numbers["low"], numbers["high"], len(data["ramp"])) == (0.5, 2, 256)
    assert np.frombuffer(b64decode(numbers["values"]), "<f4")[[0, 2]].tolist() == [0.5, 2]


def test_names_cannot_end_the_script(tmp_path: Path) -> None:
    gallery = a_gallery(tmp_path, ["a/</script><b>.png", *NAMES[1:]])
    small, skipped = thumbnails_of(gallery, [0, 1])
    assert list(small) == [1] and list(skipped) == ["a/</script><b>.png"]
    write_page(tmp_path / "p.html", gallery, POINTS, [named("class", ["a", "a", "b"])], small, "t", "s")
    assert data_of(tmp_path / "p.html")[1]["names"][0] == "a/</script><b>.png"


def test_without_files_there_is_no_list(tmp_path: Path) -> None:
    gallery = Gallery(tmp_path, a_gallery(tmp_path).parts, "elsewhere")
    write_page(tmp_path / "p.html", gallery, POINTS, [named("class", ["a", "a", "b"])], {}, "t", "s")
    data = data_of(tmp_path / "p.html")[1]
    assert not data["files"] and "elsewhere" in data["why"] and data["names"] == NAMES


def test_colors_of_names_differ() -> None:
    colors = colors_of([str(i) for i in range(12)])
    assert len({tuple(color) for color in colors}) == 12
