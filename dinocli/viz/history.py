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
_decode = json.JSONDecoder().raw_decode  # called by json.loads, but takes two thirds of its time
_BLOCK = 4096  # lines held in memory at once as text and objects


@dataclass(frozen=True)
class Curve:
    """Value over the steps at which it was logged.

    Attributes:
        steps: Steps in rising order. [S]
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
    """Curve with fewer points that each summarize several lines.

    Attributes:
        steps: Mean step of each point. [P]
        mean: Mean of each point's finite values. NaN if there are none, also in `low` and `high`. [P]
        low: Lowest finite value of each point. [P]
        high: Highest finite value of each point. [P]
    """

    steps: Numbers
    mean: Numbers
    low: Numbers
    high: Numbers


def read_history(path: Path) -> dict[str, Curve]:
    """Read a metrics file in any state that a killed run left; a missing file gives no curves.

    Truncated lines and values that are not numbers are skipped. If a run resumed from an earlier step, its new lines
    replace the old lines beyond that step.
    """
    steps = array("d")
    pieces: defaultdict[str, list[Numbers]] = defaultdict(list)  # [L, 2] each: number of a line, and its value
    if path.is_file():
        with path.open("rb") as file:
            while block := list(islice(file, _BLOCK)):
                for keys, rows in _group(block, steps).items():
                    table = _table(rows)
                    for i, key in enumerate(keys, 1):
                        pieces[key].append(table[:, [0, i]])
    at = np.frombuffer(steps) if steps else np.empty(0)
    stands = at <= np.minimum.accumulate(at[::-1])[::-1] if steps else np.empty(0, dtype=bool)
    return {key: curve for key, parts in pieces.items() if (curve := _curve(np.concatenate(parts), at, stands))}


def _group(block: list[bytes], steps: array[float]) -> dict[tuple[str, ...], list[tuple[object, ...]]]:
    """Group lines with the same keys into rows of line number and values; append their steps to `steps`."""
    found: dict[tuple[str, ...], list[tuple[object, ...]]] = {}
    for text in block:
        line = _parse_line(text)
        step = _number(line.pop("step", None))
        if math.isfinite(step):
            found.setdefault(tuple(line), []).append((len(steps), *line.values()))
            steps.append(step)
    return found


def _parse_line(text: bytes) -> dict[str, Any]:
    # Lines are flat: after a truncated one without a line end, the next begins at the last brace.
    try:
        line, _ = _decode(text[max(0, text.rfind(b"{")) :].decode())
    except (ValueError, RecursionError):
        return {}
    return line if isinstance(line, dict) else {}


def _table(rows: list[tuple[object, ...]]) -> Numbers:
    """Return rows as numbers; `nan` and `inf` are strings, because JSON cannot hold them."""
    try:
        return np.array(rows, dtype=np.float64)
    except (ValueError, TypeError, OverflowError):
        return np.array([[_number(value) for value in row] for row in rows])


def _number(value: object) -> float:
    """Return a value as a number, or NaN if it is none."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (ValueError, TypeError, OverflowError):
        return math.nan


def _curve(rows: Numbers, at: Numbers, stands: NDArray[np.bool_]) -> Curve | None:
    rows = rows[rows[:, 0].argsort(kind="stable")]
    lines = rows[:, 0].astype(np.int64)
    kept = stands[lines]
    steps, values = at[lines][kept], rows[kept, 1]
    last = np.append(steps[1:] != steps[:-1], True)[: len(steps)]
    return Curve(steps[last], values[last]) if len(steps) else None


def thinned(curve: Curve, points: int = 300) -> Thinned:
    """Reduce a curve to at most `points` points without hiding a spike."""
    count = len(curve.steps)
    starts = np.arange(min(points, count)) * count // min(points, count)
    sizes = np.diff(np.append(starts, count))
    values = np.where(np.isfinite(curve.values), curve.values, np.nan)
    some = np.add.reduceat(~np.isnan(values), starts, dtype=np.int64)
    with np.errstate(invalid="ignore"):
        mean = np.add.reduceat(np.nan_to_num(values), starts) / np.where(some, some, np.nan)
    return Thinned(
        np.add.reduceat(curve.steps, starts) / sizes,
        mean,
        np.fmin.reduceat(values, starts),
        np.fmax.reduceat(values, starts),
    )
