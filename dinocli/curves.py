"""Curves: panels of what a run logged, each with a sentence on what a healthy one looks like."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from dinocli.atomic import atomic
from dinocli.history import Curve, thinned

_WIDTH, _LANE, _HEADING = 4.4, 1.75, 0.3  # inches; at 72 points the text is as large on a phone as the page's small print
_INK, _FAINT, _BAD = "#4a4a4a", "#c9c9c9", "#c0392b"
_COLORS = ("#1f6fb4", "#c8651b", "#3a8f3a", "#8757b5", "#a33c55")
# What the page sets in its light and in its dark style.
_VARIABLES = {_INK: "--ink", _FAINT: "--line", _BAD: "--bad"} | {c: f"--curve-{i}" for i, c in enumerate(_COLORS)}
_STYLE = {
    "svg.fonttype": "none",  # text stays text, in the page's own font
    "svg.hashsalt": "dinocli",  # without it two drawings of the same curve differ
    "font.size": 8.5,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "ytick.color": _INK,
    "grid.color": _FAINT,
    "grid.linewidth": 0.5,
    "path.simplify": True,
}


class LossFacts(NamedTuple):
    """What a loss on prototypes comes to when it tells nothing: weight * ln(prototypes)."""

    weight: float
    prototypes: int

    @property
    def entropy(self) -> float:
        """Of a target that gives all prototypes the same, in nats."""
        return math.log(self.prototypes)


@dataclass(frozen=True)
class Lane:
    """Curves on one scale.

    Attributes:
        title: What is drawn, with its unit.
        curves: By their names in the legend.
        marks: Levels for a dotted line, by what they mean.
        log: Whether the scale is logarithmic.
        whole: Whether 0 belongs in the picture.
    """

    title: str
    curves: dict[str, Curve]
    marks: dict[str, float] = field(default_factory=dict)
    log: bool = False
    whole: bool = False


@dataclass(frozen=True)
class Panel:
    """A picture with a heading.

    Attributes:
        title: The heading.
        healthy: What a healthy curve looks like, in a sentence or two.
        lanes: One below the other, with the same steps.
    """

    title: str
    healthy: str
    lanes: list[Lane]


def panels(history: Mapping[str, Curve], losses: Mapping[str, LossFacts]) -> list[Panel]:
    """The panels for which something was logged.

    Args:
        history: What was logged, by its key.
        losses: What is known of the losses on prototypes, by their names.
    """
    every = [*_training(history, losses), *_monitor(history), *_schedules(history), *_machine(history)]
    filled = [Panel(p.title, p.healthy, [lane for lane in p.lanes if lane.curves]) for p in every]
    return [panel for panel in filled if panel.lanes]


def _training(history: Mapping[str, Curve], losses: Mapping[str, LossFacts]) -> list[Panel]:
    parts = _pick(history, {name: name for name in (*losses, "ibot", "koleo", "dino")})
    whole = _pick(history, {"loss": "loss"})
    curves = whole if whole and len(parts) < 2 else whole | parts
    flat = {f"ln K = {facts.weight * facts.entropy:.2f}": facts.weight * facts.entropy for facts in losses.values()}
    uniform = {f"ln K = {facts.entropy:.2f}": facts.entropy for facts in losses.values()}
    return [
        Panel(
            "Loss",
            "It starts near the dotted line and falls. With a vision transformer it often rises again while the teacher "
            "temperature warms up, and then falls once more. A loss that stays on the line tells nothing of any image: "
            "take a lower teacher temperature or fewer prototypes.",
            [Lane("loss, nats", curves, flat)],
        ),
        Panel(
            "Teacher entropy and KL",
            "There are two ways to collapse: entropy on the dotted line, all prototypes alike, or at 0, one for all "
            "images. In both the KL between teacher and student goes to 0. In health the entropy settles between them, and after the first steps "
            "the KL stays clear of 0.",
            [
                Lane("entropy, nats", _ending(history, "/teacher_entropy"), uniform, whole=True),
                Lane("KL, nats", _ending(history, "/kl"), whole=True),
            ],
        ),
        Panel(
            "Prototypes in use",
            "It rises early and stays. If it falls towards 0, a few prototypes take all images.",
            [Lane("% of all", _ending(history, "/prototypes", 100), whole=True)],
        ),
        Panel(
            "Spread of the features",
            "The standard deviation from image to image. It stays clear of 0, where all images get the same features.",
            [Lane("standard deviation", _pick(history, {"features": "feature_std"}), whole=True)],
        ),
        Panel(
            "Gradient norm",
            "Before clipping. After the warm-up it stays within a factor of ten or so; spikes that grow ask for a lower "
            "rate or a tighter clip.",
            [Lane("norm, logarithmic", _pick(history, {"gradient": "grad_norm"}), log=True)],
        ),
        Panel(
            "Steps passed over",
            "Steps whose loss or gradient was not finite, and which changed nothing. There should be none, or few that "
            "do not become more.",
            [Lane("steps so far", _if_any(_pick(history, {"skipped": "skipped"})), whole=True)],
        ),
    ]


def _monitor(history: Mapping[str, Curve]) -> list[Panel]:
    return [
        Panel(
            "k-NN accuracy",
            "Labelled images told by their neighbours. It rises for most of the run, fastest early; where it falls for "
            "long while the loss falls too, look at the pictures below.",
            [Lane("% right", _pick(history, {"k-NN": "knn"}))],
        ),
        Panel(
            "Features without labels",
            "Effective rank: how many directions the features use; it rises, and near 1 all images look alike. "
            "Uniformity: how evenly they lie; it falls from near 0, all alike, towards -4.",
            [
                Lane("effective rank", _pick(history, {"rank": "rank"})),
                Lane("uniformity", _pick(history, {"uniformity": "uniformity"})),
            ],
        ),
    ]


def _schedules(history: Mapping[str, Curve]) -> list[Panel]:
    return [
        Panel(
            "Rate and weight decay",
            "As the settings have them: mostly the rate warms up and then falls, and the weight decay rises.",
            [
                Lane("learning rate", _pick(history, {"rate": "lr"}), whole=True),
                Lane("weight decay", _pick(history, {"weight decay": "weight_decay"})),
            ],
        ),
        Panel(
            "Momentum and temperature",
            "As the settings have them: the teacher's momentum rises to 1, so that it moves less and less; its "
            "temperature warms up in the first epochs, or stays.",
            [
                Lane("momentum", _pick(history, {"momentum": "momentum"})),
                Lane("temperature", _ending(history, "/temperature")),
            ],
        ),
    ]


def _machine(history: Mapping[str, Curve]) -> list[Panel]:
    return [
        Panel(
            "Speed and waiting",
            "Both are flat. Where a step waits for data for more than a few percent of its time, more --workers, "
            "--cache or smaller files make the run faster.",
            [
                Lane("images a second", _pick(history, {"speed": "images_per_second"}), whole=True),
                Lane("% of the time waited", _pick(history, {"waited": "data_wait"}, 100), whole=True),
            ],
        ),
        Panel(
            "Memory",
            "The most in use so far. After the first steps it is flat; one that keeps growing ends the run.",
            [Lane("GiB", _pick(history, {"memory": "peak_memory"}, 2**-30), whole=True)],
        ),
    ]


def _pick(history: Mapping[str, Curve], keys: Mapping[str, str], scale: float = 1.0) -> dict[str, Curve]:
    there = {name: history[key] for name, key in keys.items() if key in history}
    return {name: Curve(c.steps, c.values * scale) for name, c in there.items()}


def _ending(history: Mapping[str, Curve], end: str, scale: float = 1.0) -> dict[str, Curve]:
    """The curves of a kind, each by the name of its loss."""
    return _pick(history, {key.removesuffix(end): key for key in history if key.endswith(end)}, scale)


def _if_any(curves: dict[str, Curve]) -> dict[str, Curve]:
    return {name: curve for name, curve in curves.items() if (curve.values > 0).any()}


def panel_svg(panel: Panel, label: str) -> str:
    """A panel as an SVG element whose colors are variables of the page's.

    Args:
        panel: What to draw.
        label: Says it in words, for those who do not see it; it is to be escaped already.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, _height(panel)))
        _draw(figure, panel, _height(panel))
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Type")))
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)  # several drawings on a page would share these
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    size = re.search(r'viewBox="([^"]*)"', svg)
    return re.sub(r"<svg[^>]*>", f'<svg role="img" aria-label="{label}" viewBox="{size and size[1]}">', svg, count=1)


def write_sheet(drawn: Sequence[Panel], path: Path) -> None:
    """All panels as one PNG, three a row."""
    columns = min(3, len(drawn)) or 1
    rows = [drawn[i : i + columns] for i in range(0, len(drawn), columns)] or [[]]
    heights = [max((_height(panel) for panel in row), default=1.0) + _HEADING for row in rows]
    with matplotlib.rc_context(_STYLE):
        page = Figure(figsize=(_WIDTH * columns, sum(heights)), dpi=100, facecolor="white")
        grid = page.subfigures(len(rows), columns, squeeze=False, height_ratios=heights)
        for row, cells, height in zip(rows, grid, heights, strict=True):
            for panel, cell in zip(row, cells, strict=False):
                cell.text(0.125, 1 - 0.06 / height, panel.title, va="top", fontsize=10, fontweight="bold")
                _draw(cell, panel, height, above=_HEADING)
        if not drawn:
            page.text(0.5, 0.5, "nothing was logged yet", ha="center", va="center")
        with atomic(path) as draft:
            page.savefig(draft, format="png")


def _height(panel: Panel) -> float:
    return _LANE * (1 if len(panel.lanes) == 1 else 0.8 * len(panel.lanes)) + 0.15


def _draw(figure: Figure | SubFigure, panel: Panel, height: float, above: float = 0.0) -> None:
    """Draw a panel into a figure of so many inches, below a strip of so many for a heading."""
    margins = {"left": 0.125, "right": 0.975, "bottom": 0.33 / height, "top": 1 - (0.22 + above) / height}
    lanes = figure.subplots(len(panel.lanes), sharex=True, squeeze=False, gridspec_kw={**margins, "hspace": 0.36})
    for axes, lane in zip(lanes[:, 0], panel.lanes, strict=True):
        _draw_lane(axes, lane)
    lowest = lanes[-1, 0]
    lowest.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    lowest.xaxis.set_major_formatter(EngFormatter(sep=""))
    lowest.annotate("step", (1, 0), (0, -15), "axes fraction", "offset points", ha="right", va="top", fontsize=7.5)


def _draw_lane(axes: Axes, lane: Lane) -> None:
    # A title at a given height: to look for one itself costs matplotlib a third of the time.
    axes.set_title(lane.title, loc="left", fontsize=8.5, pad=4, y=1.0)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    positive = all((curve.finite > 0).all() for curve in lane.curves.values())
    log = lane.log and positive
    axes.set_yscale("log" if log else "linear")
    for (name, curve), color in zip(lane.curves.items(), _COLORS * len(lane.curves), strict=False):
        few = thinned(curve)
        marker = "o" if len(few.steps) < 25 else ""
        axes.plot(few.steps, few.mean, color=color, linewidth=1.3, marker=marker, markersize=2.5, label=name)
        if len(few.steps) < len(curve.steps):
            axes.fill_between(few.steps, few.low, few.high, color=color, alpha=0.25, linewidth=0)
        bad = curve.steps[~np.isfinite(curve.values)][:200]
        axes.plot(bad, [0] * len(bad), "|", color=_BAD, clip_on=False, transform=axes.get_xaxis_transform())
    for name, level in lane.marks.items():
        axes.axhline(level, color=_INK, linewidth=1, linestyle=":")
        axes.annotate(name, (1, level), (0, 2), ("axes fraction", "data"), "offset points", ha="right", fontsize=7.5)
    if log:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif lane.whole:
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]) if not positive else 0.0, top=axes.get_ylim()[1] * 1.04)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if len(lane.curves) > 1:
        axes.legend(loc="lower left", bbox_to_anchor=(0.3, 0.94), ncols=4, frameon=False, fontsize=7.5)
