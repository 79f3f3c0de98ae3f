from __future__ import annotations

import math
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinocli.curves import LossFacts, panel_svg, panels, write_sheet
from dinocli.history import Curve

DINO = {"dino": LossFacts(1.0, 256)}


def curve(*values: float) -> Curve:
    return Curve(np.arange(1.0, len(values) + 1), np.array(values, dtype=float))


def history(*keys: str) -> dict[str, Curve]:
    return {key: curve(3, 2, 1) for key in keys}


@pytest.mark.parametrize(
    ("key", "title"),
    [
        ("loss", "Loss"),
        ("dino/teacher_entropy", "Teacher entropy and KL"),
        ("dino/kl", "Teacher entropy and KL"),
        ("dino/prototypes", "Prototypes in use"),
        ("feature_std", "Spread of the features"),
        ("grad_norm", "Gradient norm"),
        ("skipped", "Steps passed over"),
        ("knn", "k-NN accuracy"),
        ("rank", "Features without labels"),
        ("uniformity", "Features without labels"),
        ("lr", "Rate and weight decay"),
        ("weight_decay", "Rate and weight decay"),
        ("momentum", "Momentum and temperature"),
        ("dino/temperature", "Momentum and temperature"),
        ("images_per_second", "Speed and waiting"),
        ("data_wait", "Speed and waiting"),
        ("peak_memory", "Memory"),
    ],
)
def test_a_panel_is_there_where_its_value_is(key: str, title: str) -> None:
    (panel,) = panels(history(key), DINO)
    assert panel.title == title and len(panel.lanes) == 1 and panel.healthy.endswith(".")


def test_without_values_there_is_no_panel() -> None:
    assert panels({}, DINO) == []
    assert panels(history("unheard_of"), DINO) == []
    assert panels({"skipped": curve(0, 0)}, DINO) == [], "that nothing went wrong needs no picture"


def test_parts_of_a_loss_are_drawn_where_there_are_several() -> None:
    assert list(panels(history("loss", "dino"), DINO)[0].lanes[0].curves) == ["loss"]
    both = DINO | {"ibot": LossFacts(0.5, 16)}
    lane = panels(history("loss", "dino", "ibot"), both)[0].lanes[0]
    assert set(lane.curves) == {"loss", "dino", "ibot"}
    assert list(lane.marks.values()) == pytest.approx([math.log(256), 0.5 * math.log(16)])


def test_the_line_of_collapse_stands_at_ln_k() -> None:
    lane = panels(history("dino/teacher_entropy"), {"dino": LossFacts(2.0, 1024)})[0].lanes[0]
    assert lane.marks == {"ln K = 6.93": math.log(1024)}
    assert panels(history("loss"), {})[0].lanes[0].marks == {}, "of a preset that nobody knows"


class Texts(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_data(self, data: str) -> None:
        self.words += [data.strip()] if data.strip() else []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def drawn(values: dict[str, Curve]) -> Texts:
    parser = Texts()
    parser.feed(panel_svg(panels(values, DINO)[0], "in words"))
    return parser


def test_a_drawing_is_text_and_lines_in_the_pages_colors() -> None:
    svg = panel_svg(panels(history("loss"), DINO)[0], "in words")
    found = drawn(history("loss"))
    assert found.tags[0][0] == "svg" and found.tags[0][1]["aria-label"] == "in words"
    assert {"loss, nats", "step", "ln K = 5.55"} <= set(found.words)
    assert "var(--curve-0)" in svg and "var(--ink)" in svg and "#1f6fb4" not in svg
    assert svg == panel_svg(panels(history("loss"), DINO)[0], "in words"), "the same each time"


@pytest.mark.parametrize(
    "values",
    [(1,), (0, 0), (5, math.nan, 4), (math.nan,), (math.inf, -math.inf), (1e-30, 1e30), (-1, 2)],
    ids=str,
)
@pytest.mark.parametrize("key", ["loss", "grad_norm", "dino/kl"])
def test_any_values_can_be_drawn(key: str, values: tuple[float, ...], recwarn: pytest.WarningsRecorder) -> None:
    assert "step" in drawn({key: curve(*values)}).words
    assert not [str(w.message) for w in recwarn]


def test_many_lines_make_no_large_drawing() -> None:
    count = 100_000
    noisy = Curve(np.arange(count, dtype=float), np.random.default_rng(0).random(count))
    assert len(panel_svg(panels({"loss": noisy}, DINO)[0], "")) < 100_000


def test_the_sheet_shows_all_panels(tmp_path: Path) -> None:
    sizes = []
    for keys in ((), ("loss",), ("loss", "lr", "knn", "grad_norm")):
        write_sheet(panels(history(*keys), DINO), tmp_path / "curves.png")
        with Image.open(tmp_path / "curves.png") as sheet:
            sizes.append(sheet.size)
    assert sizes[0][0] == sizes[1][0] == 440 and sizes[2][0] == 1320 and sizes[2][1] > sizes[1][1]
