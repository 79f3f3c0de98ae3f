"""History of a run: one curve per value, read from metrics.jsonl."""

from __future__ import annotations

import json
import math
from array import array
from collections import defaultdict
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
_decode = json.JSONDecoder().raw_decode  # called by json.loads, which takes half as long again
_BLOCK = 4096  # lines held in memory at once as text and objects


@dataclass(frozen=True)
class Curve:
    """Logged value over training steps.

    Attributes:
        steps: Steps at which the value was logged, ascending. [S]
        values: Logged values, which may be NaN or infinite. [S]
    """

    steps: Numbers
    values: Numbers

    @property
    def finite(self) -> Numbers:
        """Finite values."""
        return self.values[np.isfinite(self.values)]


@dataclass(frozen=True)
class Thinned:
    """Curve reduced to fewer points, each a summary of several logged values.

    Attributes:
        steps: Mean step of each point. [P]
        mean: Mean of each point's finite values; NaN, as `low` and `high`, if it has none. [P]
        low: Lowest finite value of each point. [P]
        high: Highest finite value of each point. [P]
    """

    steps: Numbers
    mean: Numbers
    low: Numbers
    high: Numbers


def read_history(path: Path) -> dict[str, Curve]:
    """Read a metrics file, even one that a killed run left incomplete; a missing file gives no curves.

    Truncated lines and values that are not numbers are skipped. If a run resumed from an earlier step, its new lines
    replace the old lines beyond that step.
    """
    steps = array("d")
    pieces: defaultdict[str, list[Numbers]] = defaultdict(list)  # [L, 2] each: line number and value
    if path.is_file():
        with path.open("rb") as file:
            while block := list(islice(file, _BLOCK)):
                for keys, rows in _group_lines(block, steps).items():
                    table = _parse_table(rows)
                    for i, key in enumerate(keys, 1):
                        pieces[key].append(table[:, [0, i]])
    step_of_line = np.frombuffer(steps) if steps else np.empty(0)
    is_current = step_of_line <= np.minimum.accumulate(step_of_line[::-1])[::-1] if steps else np.empty(0, dtype=bool)
    return {
        key: curve
        for key, parts in pieces.items()
        if (curve := _build_curve(np.concatenate(parts), step_of_line, is_current))
    }


def _group_lines(block: list[bytes], steps: array[float]) -> dict[tuple[str, ...], list[tuple[object, ...]]]:
    """Group lines with the same keys into rows of line number and values; append their steps to `steps`."""
    groups: dict[tuple[str, ...], list[tuple[object, ...]]] = {}
    for text in block:
        line = _parse_line(text)
        step = _parse_number(line.pop("step", None))
        if math.isfinite(step):
            groups.setdefault(tuple(line), []).append((len(steps), *line.values()))
            steps.append(step)
    return groups


def _parse_line(text: bytes) -> dict[str, Any]:
    # A truncated line has no line end, so the next one follows on the same line, from the last brace: lines are flat.
    try:
        line, _ = _decode(text[max(0, text.rfind(b"{")) :].decode())
    except (ValueError, RecursionError):
        return {}
    return line if isinstance(line, dict) else {}


def _parse_table(rows: list[tuple[object, ...]]) -> Numbers:
    """Convert rows to numbers; `nan` and `inf` are stored as strings, because JSON has no such numbers."""
    try:
        return np.array(rows, dtype=np.float64)
    except (ValueError, TypeError, OverflowError):
        return np.array([[_parse_number(value) for value in row] for row in rows])


def _parse_number(value: object) -> float:
    """Return a value as a number, or NaN if it is not one."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (ValueError, TypeError, OverflowError):
        return math.nan


def _build_curve(rows: Numbers, step_of_line: Numbers, is_current: NDArray[np.bool_]) -> Curve | None:
    rows = rows[rows[:, 0].argsort(kind="stable")]
    lines = rows[:, 0].astype(np.int64)
    current = is_current[lines]
    steps, values = step_of_line[lines][current], rows[current, 1]
    last = np.append(steps[1:] != steps[:-1], True)[: len(steps)]
    return Curve(steps[last], values[last]) if len(steps) else None


def thinned(curve: Curve, points: int = 300) -> Thinned:
    """Reduce a curve to at most `points` points without hiding a spike."""
    count = len(curve.steps)
    starts = np.arange(min(points, count)) * count // min(points, count)
    sizes = np.diff(np.append(starts, count))
    values = np.where(np.isfinite(curve.values), curve.values, np.nan)
    finite_counts = np.add.reduceat(~np.isnan(values), starts, dtype=np.int64)
    with np.errstate(invalid="ignore"):
        mean = np.add.reduceat(np.nan_to_num(values), starts) / np.where(finite_counts, finite_counts, np.nan)
    return Thinned(
        np.add.reduceat(curve.steps, starts) / sizes,
        mean,
        np.fmin.reduceat(values, starts),
        np.fmax.reduceat(values, starts),
    )
