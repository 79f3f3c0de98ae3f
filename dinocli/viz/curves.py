"""Charts as SVG for the report page and as PNG files, and a histogram."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from dinocli.core.atomic import atomic
from dinocli.viz.history import thinned
from dinocli.viz.panels import Axis, Chart

# Inches. A chart is about as wide as a phone, so that its text is as large as the page's small print.
_WIDTH, _AXIS, _HEADING, _LINE = 4.4, 1.75, 0.3, 0.2
# Left margin, at least this share of the chart's width; width in inches of a digit, and of a tick with gap and slack.
_LEFT, _DIGIT, _TICK = 0.125, 0.071, 0.13
INK, FAINT, _BAD = "#4a4a4a", "#c9c9c9", "#c0392b"
COLORS = ("#1f6fb4", "#c8651b", "#3a8f3a", "#8757b5", "#a33c55")
LINES: tuple[Any, ...] = ("-", "--", ":")  # after each round of the colors
# CSS variables that the page sets in its light and dark styles.
_VARIABLES = {INK: "--ink", FAINT: "--line", _BAD: "--bad"} | {c: f"--curve-{i}" for i, c in enumerate(COLORS)}
_STYLE: Any = {
    "svg.fonttype": "none",  # keeps text as text, in the page's own font
    "font.size": 8.5,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "ytick.color": INK,
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
    "path.simplify": True,
}


def chart_svg(chart: Chart, label: str) -> str:
    """Return a chart as an SVG element whose colors are CSS variables of the page.

    Args:
        chart: Chart to draw.
        label: Description for screen readers, already escaped.
    """
    with style(chart.title):
        figure = Figure(figsize=(_WIDTH, _height(chart)))
        _draw(figure, chart, _height(chart))
        return figure_svg(figure, label)


def style(salt: str = "") -> AbstractContextManager[None]:
    """Return a context in which figures are drawn as on the page.

    Args:
        salt: Text that makes the ids in an SVG reproducible, and different from those of other SVGs on a page.
    """
    return matplotlib.rc_context({**_STYLE, "svg.hashsalt": salt})


def figure_svg(figure: Figure, label: str) -> str:
    """Return a figure as an SVG element whose colors are CSS variables of the page.

    Args:
        figure: Figure drawn in `style`.
        label: Description for screen readers, already escaped.
    """
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Type")))
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    size = re.search(r'viewBox="([^"]*)"', svg)
    return re.sub(r"<svg[^>]*>", f'<svg role="img" aria-label="{label}" viewBox="{size and size[1]}">', svg, count=1)


def write_sheet(drawn: Sequence[Chart], path: Path, names: Sequence[str] = ()) -> None:
    """Write all charts as one PNG, three per row.

    Args:
        drawn: Charts from left to right, then down.
        path: Output file.
        names: Names of the curves for a legend above all charts, in the order of their colors.
    """
    columns = min(3, len(drawn)) or 1
    rows = [drawn[i : i + columns] for i in range(0, len(drawn), columns)] or [[]]
    heights = [max((_height(chart) for chart in row), default=1.0) + _HEADING for row in rows]
    side_by_side = max(1, int(_WIDTH * columns / (_DIGIT * max(map(len, names), default=0) + 0.6)))
    legend = _LINE * (math.ceil(len(names) / side_by_side) + 0.5)
    with style():
        page = Figure(figsize=(_WIDTH * columns, sum(heights) + legend), dpi=100, facecolor="white")
        body: Figure | SubFigure = page
        if names:
            body = page.subfigures(2, 1, squeeze=False, height_ratios=[legend, sum(heights)])[1, 0]
        grid = body.subfigures(len(rows), columns, squeeze=False, height_ratios=heights)
        for row, cells, height in zip(rows, grid, heights, strict=True):
            for chart, cell in zip(row, cells, strict=False):
                cell.text(_LEFT, 1 - 0.06 / height, chart.title, va="top", fontsize=10, fontweight="bold")
                _draw(cell, chart, height, above=_HEADING)
        if names:
            lines = [Line2D([], [], color=color, linestyle=line) for color, line in map(curve_style, range(len(names)))]
            page.legend(lines, names, loc="upper left", ncols=side_by_side, frameon=False, borderaxespad=0.2)
        if not drawn:
            page.text(0.5, 0.5, "no values logged yet", ha="center", va="center")
        with atomic(path) as draft:
            page.savefig(draft, format="png")


def curve_style(place: int) -> tuple[str, Any]:
    """Return the color and the line style of a curve by its place among the curves of an axis."""
    return COLORS[place % len(COLORS)], LINES[place // len(COLORS) % len(LINES)]


def write_histogram(values: NDArray[np.floating[Any]], title: str, mark: float | None, path: Path) -> None:
    """Write a histogram as a PNG, with logarithmic counts and a line at `mark` if given."""
    values = values[np.isfinite(values)]
    marks = [] if mark is None else [mark]
    ends = [*marks, *([float(values.min()), float(values.max())] if len(values) else [0.0, 1.0])]
    bins = np.linspace(min(ends), max(ends) + 1e-6, 101)
    with style():
        figure = Figure(figsize=(1.6 * _WIDTH, 1.6 * _AXIS), dpi=120, facecolor="white", layout="constrained")
        axes = figure.subplots()
        axes.hist(values, bins.tolist(), log=True, color=COLORS[0])
        for level in marks:
            axes.axvline(level, color=COLORS[1], linewidth=1.2)
            label = f"{level:g}: {int((values >= level).sum()):,} of {len(values):,} at or above"
            side = ((-4, 9), "right") if level - bins[0] > bins[-1] - level else ((4, 9), "left")
            axes.annotate(label, (level, 1), side[0], ("data", "axes fraction"), "offset points", ha=side[1], va="top")
        axes.set_title(title, loc="left", fontsize=10, fontweight="bold", pad=16)
        axes.set_ylabel("images (log scale)")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        with atomic(path) as draft:
            figure.savefig(draft, format="png")


def _height(chart: Chart) -> float:
    return _AXIS * (1 if len(chart.axes) == 1 else 0.8 * len(chart.axes)) + 0.15


def _draw(figure: Figure | SubFigure, chart: Chart, height: float, above: float = 0.0) -> None:
    """Draw a chart into a figure of `height` inches, with `above` inches for a heading on top."""
    margins = {"right": 0.975, "bottom": 0.33 / height, "top": 1 - (0.22 + above) / height}
    rows = figure.subplots(len(chart.axes), sharex=True, squeeze=False, gridspec_kw={**margins, "hspace": 0.36})
    widest = max(_draw_axis(axes, axis) for axes, axis in zip(rows[:, 0], chart.axes, strict=True))
    figure.subplots_adjust(left=max(_LEFT, (widest * _DIGIT + _TICK) / _WIDTH))
    low, high = rows[-1, 0].get_xlim()
    if high - low < 2:  # else a single step gets ticks such as 950m and 1.05
        rows[-1, 0].set_xlim((low + high) / 2 - 1, (low + high) / 2 + 1)
    lowest = rows[-1, 0]
    lowest.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    lowest.xaxis.set_major_formatter(EngFormatter(sep=""))
    lowest.annotate("step", (1, 0), (0, -15), "axes fraction", "offset points", ha="right", va="top", fontsize=7.5)


def _draw_axis(axes: Axes, axis: Axis) -> int:
    """Draw curves on one scale; return the number of characters in its longest label."""
    # A fixed title height: matplotlib's own search for one takes a third of the drawing time.
    axes.set_title(axis.title, loc="left", fontsize=8.5, pad=4, y=1.0)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    positive = all((curve.finite > 0).all() for curve in axis.curves.values())
    log = axis.log and positive
    axes.set_yscale("log" if log else "linear")
    for place, (name, curve) in enumerate(axis.curves.items()):
        if not len(curve.steps):  # a run of several that did not log it, and that keeps its color
            continue
        (color, line), points = curve_style(place), thinned(curve)
        marker = "o" if len(points.steps) < 25 else ""
        axes.plot(
            points.steps,
            points.mean,
            color=color,
            linestyle=line,
            linewidth=1.3,
            marker=marker,
            markersize=2.5,
            label=name,
        )
        if len(points.steps) < len(curve.steps):
            axes.fill_between(points.steps, points.low, points.high, color=color, alpha=0.25, linewidth=0)
        bad = curve.steps[~np.isfinite(curve.values)][:200]
        axes.plot(bad, [0] * len(bad), "|", color=_BAD, clip_on=False, transform=axes.get_xaxis_transform())
    for name, level in axis.marks.items():
        axes.axhline(level, color=INK, linewidth=1, linestyle=":")
        coordinates: Any = ("axes fraction", "data")  # below the line: the legend is above it
        axes.annotate(name, (1, level), (0, -2), coordinates, "offset points", ha="right", va="top", fontsize=7.5)
    if log:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif axis.whole:
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]) if not positive else 0.0, top=axes.get_ylim()[1] * 1.04)
    low, high = axes.get_ylim()
    ticks = [tick for tick in axes.get_yticks() if low <= tick <= high]
    digits = _digits(ticks)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.{digits}g}")
    if len(axis.curves) > 1 and axis.legend:
        axes.legend(
            loc="lower right", bbox_to_anchor=(1, 1), ncols=len(axis.curves), frameon=False, fontsize=7.5,
            borderaxespad=0.1, borderpad=0.1, handlelength=1.2, handletextpad=0.4, columnspacing=1.0,
        )  # fmt: skip
    return max((len(f"{tick:.{digits}g}") for tick in ticks), default=0)


def _digits(ticks: Sequence[float]) -> int:
    """Return the number of significant digits that distinguishes neighbouring ticks, such as 0.9999975 and 1."""
    steps = [b - a for a, b in pairwise(ticks) if b > a]
    largest = max((abs(tick) for tick in ticks), default=0.0)
    return max(6, math.ceil(math.log10(largest / min(steps))) + 2) if steps and largest else 6
