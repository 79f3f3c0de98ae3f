"""History: metrics.jsonl read back, a curve a value."""

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
_decode = json.JSONDecoder().raw_decode  # what json.loads calls, in two thirds of its time
_BLOCK = 4096  # lines that are held as text and objects at once


@dataclass(frozen=True)
class Curve:
    """A value over the steps at which it was logged.

    Attributes:
        steps: In rising order. [S]
        values: NaN or infinite where that was logged. [S]
    """

    steps: Numbers
    values: Numbers

    @property
    def finite(self) -> Numbers:
        """The values that are numbers."""
        return self.values[np.isfinite(self.values)]


@dataclass(frozen=True)
class Thinned:
    """A curve in few points, each of which stands for several lines.

    Attributes:
        steps: The middle of each point's steps. [P]
        mean: Of its finite values; NaN where there is none, as below. [P]
        low: The lowest of them. [P]
        high: The highest of them. [P]
    """

    steps: Numbers
    mean: Numbers
    low: Numbers
    high: Numbers


def read_history(path: Path) -> dict[str, Curve]:
    """Read a metrics file, whatever state a killed run left it in; a file that is not there holds no curves.

    A line that is torn is passed over, and so is what is no number. Where a run went on from an earlier step, what it
    had logged beyond that step before is replaced.
    """
    steps = array("d")
    pieces: defaultdict[str, list[Numbers]] = defaultdict(list)  # [L, 2] each: number of a line, and its value
    if path.is_file():
        with path.open("rb") as file:
            while block := list(islice(file, _BLOCK)):
                for keys, rows in _by_keys(block, steps).items():
                    table = _table(rows)
                    for i, key in enumerate(keys, 1):
                        pieces[key].append(table[:, [0, i]])
    at = np.frombuffer(steps) if steps else np.empty(0)
    stands = at <= np.minimum.accumulate(at[::-1])[::-1] if steps else np.empty(0, dtype=bool)
    return {key: curve for key, parts in pieces.items() if (curve := _curve(np.concatenate(parts), at, stands))}


def _by_keys(block: list[bytes], steps: array[float]) -> dict[tuple[str, ...], list[tuple[object, ...]]]:
    """Lines as rows of their number and their values, those with the same keys together; their steps are added."""
    found: dict[tuple[str, ...], list[tuple[object, ...]]] = {}
    for text in block:
        line = _parsed(text)
        step = _number(line.pop("step", None))
        if math.isfinite(step):
            found.setdefault(tuple(line), []).append((len(steps), *line.values()))
            steps.append(step)
    return found


def _parsed(text: bytes) -> dict[str, Any]:
    # Lines are flat: after a torn one without an end, the next begins at the last brace.
    try:
        line, _ = _decode(text[max(0, text.rfind(b"{")) :].decode())
    except (ValueError, RecursionError):
        return {}
    return line if isinstance(line, dict) else {}


def _table(rows: list[tuple[object, ...]]) -> Numbers:
    """Rows as numbers; `nan` and `inf` come as strings, since JSON cannot hold them."""
    try:
        return np.array(rows, dtype=np.float64)
    except (ValueError, TypeError, OverflowError):
        return np.array([[_number(value) for value in row] for row in rows])


def _number(value: object) -> float:
    """A number, or NaN for what is none."""
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
    """A curve in at most so many points, of which none hides a spike."""
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
