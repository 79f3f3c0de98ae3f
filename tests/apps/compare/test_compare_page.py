from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from PIL import Image

from dinocli.apps.compare.compare import Comparison, Figures
from dinocli.apps.compare.page import list_rows, write_page
from dinocli.data.sources.open import splits
from dinocli.evals.bootstrap import paired_difference
from dinocli.features.store import Features, Provenance

VOID = {"meta", "img", "br"}
NAMES = ["runs/<b>", "B & C"]


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("th", "td"):
            self.rows[-1].append(data)
        self.words.append(data)


def comparison(images: Path, *, labels: bool = True) -> Comparison:
    """Return a comparison over the twelve images of two classes, in which the networks disagree on seven."""
    source = splits(str(images))["all"]
    first = np.arange(12) < 6
    second = np.arange(12) < 11
    second[3] = second[4] = False
    networks = [Figures(name, name, 5, 16, 8, 1_500_000, 6.0, 123.4, 3.21, -1.5, 4.56) for name in NAMES]
    networks[1] = replace(networks[1], lidar=None, step=None)
    test = Features(
        np.zeros((12, 8), np.float32),
        source.labels.astype(np.int64),
        list(source.names),
        source.classes,
        {},
        Provenance("x", "", "cls", 1, 16, "d"),
    )
    if not labels:
        return Comparison("d", networks, [{}, {}], [{}, {}], None, 12, None, False, "all", replace(test, classes=[]))
    networks = [replace(n, knn=100 * float(c.mean())) for n, c in zip(networks, (first, second), strict=True)]
    differences = [{}, {"knn": paired_difference(first, second)}]
    return Comparison("d", networks, [{"knn": first}, {"knn": second}], differences, 5, 12, 11, True, "all", test)


def test_the_page_shows_figures_verdict_classes_and_photos(images: Path, tmp_path: Path) -> None:
    result = comparison(images)
    path = write_page(result, splits(str(images))["all"], tmp_path)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    words = " ".join(page.words)
    assert result.verdicts[0] in words and "runs/<b> and B & C on d" in words
    assert ["k-NN, %", "50.00", *list_rows(result)[0][2:]] in page.rows and "75.00 (+25.0, " in list_rows(result)[0][2]
    assert ["LiDAR", "4.6"] in page.rows and ["step", "5"] in page.rows, "the second has neither"
    assert ["b", "6", "0.0", "83.3"] in page.rows and ["a", "6", "100.0", "66.7"] in page.rows
    assert page.rows.index(["b", "6", "0.0", "83.3"]) < page.rows.index(["a", "6", "100.0", "66.7"])
    assert "5 that B & C classifies correctly, and runs/<b> does not" in words
    assert "2 that runs/<b> classifies correctly, and B & C does not" in words
    tiles = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(tiles) == 7 and all((t["src"] or "").startswith("data:image/jpeg;base64,") for t in tiles)
    assert {t["alt"] for t in tiles if (t["alt"] or "").startswith("a: ")} == {"a: a/0003.png", "a: a/0004.png"}
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags} and not re.findall(r"url\((?!#)", text)
    (svg,) = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert "B & C, k-NN: +25.0" in (svg["aria-label"] or "")
    with Image.open(tmp_path / "compare.png") as picture:
        assert picture.width > 300


def test_a_page_without_labels_has_no_differences(images: Path, tmp_path: Path) -> None:
    write_page(comparison(images), None, tmp_path)
    page = Page(write_page(comparison(images, labels=False), None, tmp_path).read_text(encoding="utf-8"))
    assert "no verdict without labels" in " ".join(page.words)
    assert not any(row[:1] == ["k-NN, %"] for row in page.rows) and "svg" not in {tag for tag, _ in page.tags}
    assert not (tmp_path / "compare.png").exists(), "the picture of the earlier comparison is gone"


def test_unreadable_photos_are_not_shown(images: Path, tmp_path: Path) -> None:
    source, result = splits(str(images))["all"], comparison(images)
    (images / "a" / "0003.png").unlink()
    (images / "a" / "0004.png").write_bytes(b"no image")
    page = Page(write_page(result, source, tmp_path).read_text(encoding="utf-8"))
    assert len([tag for tag, _ in page.tags if tag == "img"]) == 5
