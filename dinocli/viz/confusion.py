"""Confusion matrix as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from dinocli.core.atomic import atomic
from dinocli.core.errors import visible

_COUNTED = 25  # classes: counts of more do not fit in their cells
_NAMED = 60  # classes: names of more overlap
_CELL, _LEAST, _MOST = 0.36, 3.2, 12.0  # inches
_LONGEST = 24  # characters of a class name
_INK, _PAPER = "#4a4a4a", "#ffffff"


def write_confusion(table: NDArray[np.int64], classes: Sequence[str], title: str, path: Path) -> None:
    """Write a confusion matrix as a PNG: one row per true class, in shades of the share of its images.

    Args:
        table: Number of images by true class (row) and predicted class (column). [K, K]
        classes: Names of the K classes.
        title: Line above the matrix.
        path: Output file.
    """
    shares = table / np.maximum(table.sum(1, keepdims=True), 1)
    side = min(_MOST, max(_LEAST, _CELL * len(classes)))
    names = [_shorten(name) for name in classes]
    with matplotlib.rc_context({"font.size": 8.5, "text.color": _INK, "axes.edgecolor": _INK, "axes.linewidth": 0.6}):
        figure = Figure(figsize=(side + 2.4, side + 1.9), dpi=120, facecolor="white", layout="constrained")
        axes = figure.subplots()
        # Classes need not have different names or safe characters, so no name is parsed as mathematics.
        shown = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        places = range(len(names)) if len(names) <= _NAMED else []
        labels = names if len(names) <= _NAMED else []
        axes.set_xticks(places, labels, rotation=45, ha="right", rotation_mode="anchor", parse_math=False)
        axes.set_yticks(places, labels, parse_math=False)
        axes.tick_params(length=0)
        axes.set_xlabel("predicted class")
        axes.set_ylabel("true class")
        axes.set_title(title, loc="left", fontsize=10, fontweight="bold", parse_math=False)
        for row, column in np.argwhere(table) if len(names) <= _COUNTED else []:
            color = _PAPER if shares[row, column] > 0.5 else _INK
            axes.text(column, row, str(table[row, column]), ha="center", va="center", color=color, fontsize=7.5)
        bar = figure.colorbar(shown, ax=axes, shrink=0.6, ticks=[0, 0.5, 1], format=lambda share, _: f"{share:.0%}")
        bar.set_label("share of the true class")
        with atomic(path) as draft:
            figure.savefig(draft, format="png")


def _shorten(name: str) -> str:
    plain = visible(name)
    return plain if len(plain) <= _LONGEST else plain[: _LONGEST - 3] + "..."
