"""Metrics: one line per logged step in metrics.jsonl, and the speed of training."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

from dinocli.core.atomic import write_text
from dinocli.core.checksums import parse


class Metrics:
    """Writer of one JSON line per logged step.

    Args:
        path: File to append to.
        step: Step to resume from; lines of later steps and incomplete lines are removed.
    """

    def __init__(self, path: Path, step: int = 0) -> None:
        self.path = path
        if path.exists():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            write_text(path, "".join(f"{line}\n" for line in lines if _parse_step(line) <= step))

    def write(self, values: dict[str, float | int]) -> None:
        """Append a line; values that are not finite become strings, since JSON has no such numbers."""
        plain = {k: v if abs(v) < float("inf") else str(v) for k, v in values.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(plain) + "\n")


def _parse_step(line: str) -> float:
    """Return the step of a line; infinity if the line is incomplete or not from this tool."""
    try:
        step = parse(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
    return step if isinstance(step, int) else math.inf


class Pace:
    """Speed of training, and the share of time spent waiting for data, since the last reading."""

    def __init__(self) -> None:
        self._images = 0
        self._since = time.perf_counter()
        self._waited = 0.0

    def add(self, images: int) -> None:
        """Count the images of a step."""
        self._images += images

    @property
    def elapsed(self) -> float:
        """Seconds since the last reading."""
        return time.perf_counter() - self._since

    def look(self, waited: float) -> tuple[float, float]:
        """Return images per second and the share of time spent waiting since the last reading, then reset.

        Args:
            waited: Seconds spent waiting for data since the start.
        """
        elapsed = max(self.elapsed, 1e-9)
        reading = self._images / elapsed, (waited - self._waited) / elapsed
        self._images, self._since, self._waited = 0, time.perf_counter(), waited
        return reading
