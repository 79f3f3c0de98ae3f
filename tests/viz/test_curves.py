from __future__ import annotations

import math
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from dinocli.viz import curves
from dinocli.viz.curves import chart_svg, write_histogram, write_sheet
from dinocli.viz.history import Curve
from dinocli.viz.panels import LossFacts, charts

DINO = {"dino": LossFacts(1.0, 256)}


def curve(*values: float) -> Curve:
    return Curve(np.arange(1.0, len(values) + 1), np.array(values, dtype=float))


def history(*keys: str) -> dict[str, Curve]:
    return {key: curve(3, 2, 1) for key in keys}


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
    parser.feed(chart_svg(charts(values, DINO)[0], "in words"))
    return parser


def test_a_chart_is_reproducible_svg_in_the_pages_colors() -> None:
    svg = chart_svg(charts(history("loss"), DINO)[0], "in words")
    found = drawn(history("loss"))
    assert found.tags[0][0] == "svg" and found.tags[0][1]["aria-label"] == "in words"
    assert {"loss, nats", "step", "ln K = 5.55"} <= set(found.words)
    assert "var(--curve-0)" in svg and "var(--ink)" in svg and "#1f6fb4" not in svg
    assert svg == chart_svg(charts(history("loss"), DINO)[0], "in words"), "reproducible"


@pytest.mark.parametrize(
    "values", [(1,), (0, 0), (5, math.nan, 4), (math.nan,), (math.inf, -math.inf), (1e-30, 1e30), (-1, 2)], ids=str
)
@pytest.mark.parametrize("key", ["loss", "grad_norm", "dino/kl"])
def test_any_values_can_be_drawn(key: str, values: tuple[float, ...], recwarn: pytest.WarningsRecorder) -> None:
    assert "step" in drawn({key: curve(*values)}).words
    assert not [str(w.message) for w in recwarn]


def test_a_curve_of_many_steps_gives_a_small_svg() -> None:
    count = 100_000
    noisy = Curve(np.arange(count, dtype=float), np.random.default_rng(0).random(count))
    assert len(chart_svg(charts({"loss": noisy}, DINO)[0], "")) < 100_000


def test_the_sheet_grows_with_the_number_of_charts(tmp_path: Path) -> None:
    sizes = []
    for keys in ((), ("loss",), ("loss", "lr", "knn", "grad_norm")):
        write_sheet(charts(history(*keys), DINO), tmp_path / "curves.png")
        with Image.open(tmp_path / "curves.png") as sheet:
            sizes.append(sheet.size)
    assert sizes[0][0] == sizes[1][0] == 440 and sizes[2][0] == 1320 and sizes[2][1] > sizes[1][1]


@pytest.mark.parametrize("mark", [None, 0.5, 2.0])
def test_a_histogram_is_drawn_for_any_values(tmp_path: Path, mark: float | None) -> None:
    generator = np.random.default_rng(0)
    for name, values in (("many", generator.random(999)), ("one", np.array([0.3])), ("odd", np.array([np.nan, 1.0]))):
        write_histogram(values.astype(np.float32), "cosine", mark, tmp_path / f"{name}.png")
        picture = np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB"))
        assert (np.abs(picture.astype(int) - (0x1F, 0x6F, 0xB4)).max(-1) < 10).any(), "bars"
        assert (np.abs(picture.astype(int) - (0xC8, 0x65, 0x1B)).max(-1) < 10).any() == (mark is not None), "the mark"


@pytest.mark.parametrize("steps", [[1], [1, 2], [1, 8, 10, 12], [500, 1_250_000]])
def test_no_label_is_cut_or_drawn_twice(steps: list[int]) -> None:
    rising = np.linspace(0, 1, len(steps))
    values = {"lr": 1.7e-4 * rising + 1e-9, "weight_decay": 0.04 + 7e-4 * rising, "momentum": 1 - 1e-5 * rising,
              "uniformity": -1.56 - 0.04 * rising, "rank": 1 + 90_000 * rising, "loss": 11 - rising, "ibot": 3 - rising,
              "koleo": -rising, "dino": 5 + rising, "peak_memory": 2e15 * (1 + rising)}  # fmt: skip
    curves_by_key = {key: Curve(np.array(steps, float), value) for key, value in values.items()}
    for chart in charts(curves_by_key, DINO):
        height = curves._height(chart)
        figure = Figure(figsize=(curves._WIDTH, height), dpi=100)
        with matplotlib.rc_context(curves._STYLE):
            curves._draw(figure, chart, height)
            canvas = FigureCanvasAgg(figure)
            canvas.draw()
            inside = figure.bbox.padded(1)
            for axes in figure.axes:
                shown = [
                    label
                    for label in axes.get_yticklabels()
                    if axes.bbox.padded(1).ymin <= label.get_window_extent().y0 + 4 <= axes.bbox.padded(1).ymax
                ]
                texts = [
                    *shown,
                    *axes.texts,
                    axes._left_title,
                    *(axes.get_legend().get_texts() if axes.get_legend() else []),
                ]
                for text in texts:
                    box = text.get_window_extent()
                    assert inside.xmin <= box.x0 and box.x1 <= inside.xmax, (chart.title, text.get_text())
                labels = [label.get_text() for label in shown]
                assert len(set(labels)) == len(labels), (chart.title, labels)
            step_labels = [label.get_text() for label in figure.axes[-1].get_xticklabels()]
            assert not any("m" in word for word in step_labels), "steps are integers"
