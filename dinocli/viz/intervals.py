"""Differences with confidence intervals, one per row, beside a line at zero: as SVG for a page and as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from dinocli.core.atomic import atomic
from dinocli.core.errors import visible
from dinocli.viz.curves import COLORS, FAINT, INK, figure_svg, style

_WIDTH, _ROW, _FRAME = 6.4, 0.34, 0.75  # inches
_LONGEST = 44  # characters of a label


@dataclass(frozen=True)
class Interval:
    """Difference with its 95 % interval.

    Attributes:
        label: Name of the row.
        mean: Difference.
        low: Lower end of the interval.
        high: Upper end of the interval.
        certain: True if the difference counts as more than chance.
    """

    label: str
    mean: float
    low: float
    high: float
    certain: bool


def intervals_svg(rows: Sequence[Interval], unit: str, label: str) -> str:
    """Return the intervals as an SVG element in the page's colors.

    Args:
        rows: Intervals from top to bottom.
        unit: Name and unit of the horizontal axis.
        label: Description for screen readers, already escaped.
    """
    with style(unit):
        return figure_svg(_draw(rows, unit), label)


def write_intervals(rows: Sequence[Interval], unit: str, path: Path) -> None:
    """Write the intervals as a PNG."""
    with style():
        figure = _draw(rows, unit)
        with atomic(path) as draft:
            figure.savefig(draft, format="png", dpi=120, facecolor="white")


def _draw(rows: Sequence[Interval], unit: str) -> Figure:
    figure = Figure(figsize=(_WIDTH, _FRAME + _ROW * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color=INK, linewidth=1, linestyle=":")
    for place, row in enumerate(rows):
        color = COLORS[0] if row.certain else INK
        axes.plot([row.low, row.high], [place, place], color=color, linewidth=2, solid_capstyle="butt")
        axes.plot([row.mean], [place], "o", color=color, markersize=5)
        text = f"{row.mean:+.1f} ({row.low:+.1f} to {row.high:+.1f})"
        axes.annotate(text, (1, place), (6, 0), ("axes fraction", "data"), "offset points", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [_shorten(row.label) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=FAINT)
    axes.set_axisbelow(True)
    axes.margins(x=0.08)
    axes.set_xlabel(unit)
    return figure


def _shorten(label: str) -> str:
    """Return a label without control characters or formulas of matplotlib, cut in the middle if it is long."""
    text = visible(label)
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2 - 1]}…{text[-_LONGEST // 2 :]}"
    return text.replace("$", r"\$")
