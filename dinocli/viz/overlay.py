"""Report of several runs: their curves on the same axes, and the settings in which they differ."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dinocli.core.atomic import write_text
from dinocli.core.errors import DinoError, nearest
from dinocli.core.runs import CURVES, METRICS, REPORT
from dinocli.method.settings import flat
from dinocli.viz.curves import COLORS, LINES, curve_style, write_sheet
from dinocli.viz.history import Curve, read_history
from dinocli.viz.page import facts_of, page_of, sections_of, table_of, text_of
from dinocli.viz.panels import Axis, Chart, charts
from dinocli.viz.report import read_json, read_losses, render_curves

MOST = len(COLORS) * len(LINES)  # runs with distinguishable curves
_SYMBOLS = {"-": "━━━", "--": "╍╍╍", ":": "┅┅┅"}
_NONE = Curve(np.empty(0), np.empty(0))


@dataclass(frozen=True)
class LoggedRun:
    """Logged values and settings of a run.

    Attributes:
        history: Logged values by key.
        preset: Stored preset; empty if it is missing.
    """

    history: Mapping[str, Curve]
    preset: dict[str, Any]


def read_runs(folders: Sequence[Path]) -> dict[str, LoggedRun]:
    """Read runs, by the shortest names that distinguish them.

    Raises:
        DinoError: If a folder is given twice, or has no logged values.
    """
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    runs = {}
    for name, folder in zip(names, folders, strict=True):
        if name in runs:
            raise DinoError(f"{folder} is given twice", "name each run once")
        history = read_history(folder / METRICS)
        if not history:
            raise DinoError(f"{folder} has no logged values in {METRICS}; expected a run folder", "dino runs")
        runs[name] = LoggedRun(history, read_json(folder / "preset.json"))
    return runs


def overlay(runs: Mapping[str, LoggedRun], values: Sequence[str] = ()) -> list[Chart]:
    """Return the charts of all runs, with one curve per run on each axis.

    Args:
        runs: Runs by name.
        values: Keys of the logged values to draw. If empty, all that a run's own report draws.

    Raises:
        DinoError: If no run has logged a value, or it has no chart.
    """
    logged = sorted({key for run in runs.values() for key in run.history if charts({key: run.history[key]}, {})})
    for key in values:
        if key not in logged:
            raise DinoError(
                f"--value {key} is not logged by these runs; expected one of {', '.join(logged)}",
                f"--value {nearest(key, logged)}" if logged else "name runs that have logged steps",
            )
    healthy: dict[str, str] = {}
    axes: dict[str, dict[tuple[str, str], Axis]] = {}  # by chart, then by axis and curve
    for name, run in runs.items():
        history = {key: curve for key, curve in run.history.items() if not values or key in values}
        for chart in charts(history, read_losses(run.preset)):
            healthy.setdefault(chart.title, chart.healthy)
            merged = axes.setdefault(chart.title, {})
            for axis in chart.axes:
                for curve_name, curve in axis.curves.items():
                    empty = replace(axis, curves=dict.fromkeys(runs, _NONE), marks={}, legend=False)
                    shared = merged.setdefault((axis.title, curve_name), empty)
                    shared.curves[name] = curve
                    shared.marks.update(axis.marks)
    return [Chart(title, healthy[title], _name_axes(merged)) for title, merged in axes.items()]


def _name_axes(axes: Mapping[tuple[str, str], Axis]) -> list[Axis]:
    """Return the axes, with the name of the curve in the title where an axis had several curves."""
    titles = [title for title, _ in axes]
    return [
        replace(axis, title=f"{title}: {curve}") if titles.count(title) > 1 else axis
        for (title, curve), axis in axes.items()
    ]


def write_overlay(runs: Mapping[str, LoggedRun], folder: Path, values: Sequence[str] = ()) -> Path:
    """Write `curves.png` and `report.html` of several runs; return the page.

    Args:
        runs: Runs by name.
        folder: Output folder.
        values: Keys of the logged values to draw. If empty, all that a run's own report draws.

    Raises:
        DinoError: If no run has logged a value, or it has no chart.
        OSError: If the folder is not writable.
    """
    drawn = overlay(runs, values)
    write_sheet(drawn, folder / CURVES, list(runs))
    items = ""
    for place, name in enumerate(runs):
        color, line = place % len(COLORS), curve_style(place)[1]
        items += f'<li><b style="color: var(--curve-{color})">{_SYMBOLS[line]}</b> {text_of(name)}</li>'
    nav, sections = sections_of(
        [
            ("Curves", f"<ul class='legend'>{items}</ul>{render_curves(drawn)}"),
            ("Differences", _render_differences(runs)),
            ("Values", table_of(["last value", *runs], list_values(runs, values), "Values")),
        ]
    )
    title = text_of(" · ".join(runs))
    head = f"<header><h1>{title}</h1>{facts_of([('runs', len(runs)), ('written', time.strftime('%Y-%m-%d %H:%M'))])}"
    write_text(folder / REPORT, page_of(title, f"{head}{nav}</header><main>{sections}</main>"))
    return folder / REPORT


def list_values(runs: Mapping[str, LoggedRun], values: Sequence[str] = ()) -> list[list[str]]:
    """Return a row per logged value: its key, and the last finite value of each run."""
    keys = values or sorted({key for run in runs.values() for key in run.history})
    lasts = [{key: curve.finite for key, curve in run.history.items()} for run in runs.values()]
    steps = [max(curve.steps[-1] for curve in run.history.values()) for run in runs.values()]
    rows = [[key, *(f"{last[key][-1]:.5g}" if len(last.get(key, ())) else "" for last in lasts)] for key in keys]
    return [["step", *(f"{step:.0f}" for step in steps)], *rows]


def _render_differences(runs: Mapping[str, LoggedRun]) -> str:
    """Render the settings that differ between the runs."""
    settings = [{k: v for k, v in flat(run.preset) if not k.startswith("about.")} for run in runs.values()]
    keys = dict.fromkeys(key for each in settings for key in each)
    rows = [[key, *(each.get(key) for each in settings)] for key in keys]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    if len(runs) < 2:
        return ""
    return table_of(["setting", *runs], rows, "Differences") if rows else "<p>All settings are the same.</p>"
