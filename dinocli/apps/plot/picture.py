"""Picture of a plot: a scatter plot of the images by one column."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from dinocli.apps.plot.columns import Column
from dinocli.apps.plot.page import colors_of, ramp
from dinocli.core.atomic import atomic
from dinocli.evals.units import Floats

_LEGEND = 30  # names in the legend
_DOTS = 20_000  # area of a point in square points, times the number of images


def write_picture(path: Path, points: Floats, column: Column, title: str) -> None:
    """Write a scatter plot as a PNG, colored by a column.

    Args:
        path: Path of the PNG.
        points: Coordinates. [S, 2]
        column: Column to color by.
        title: Title above the plot.
    """
    figure = Figure(figsize=(9, 7), layout="constrained")
    axes = figure.subplots()
    order = np.random.default_rng(0).permutation(len(points))  # else the last class hides the others
    x, y = points[order].T
    size = float(np.clip(_DOTS / len(points), 0.5, 40))
    if column.kinds:
        colors = np.array(colors_of(column.kinds)) / 255
        axes.scatter(x, y, s=size, c=colors[column.values[order].astype(int)], linewidths=0)
        marks = [
            axes.scatter([], [], s=36, color=tuple(color), label=kind)
            for kind, color in zip(column.kinds[:_LEGEND], colors, strict=False)
        ]
        axes.legend(handles=marks, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, title=column.name)
    else:
        colormap = ListedColormap(np.array(ramp()) / 255)
        drawn = axes.scatter(x, y, s=size, c=column.values[order], cmap=colormap, linewidths=0, plotnonfinite=True)
        figure.colorbar(drawn, ax=axes, label=column.name)
    axes.set_aspect("equal", "datalim")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=10)
    with atomic(path) as draft:
        figure.savefig(draft, format="png", dpi=130)
