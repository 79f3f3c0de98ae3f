"""metrics.jsonl: a line a logged step; and how fast the steps go."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

from dinocli.atomic import write_text
from dinocli.checksums import parse
from dinocli.errors import DinoError


class Metrics:
    """Appends a line of JSON for each logged step.

    Args:
        path: The file.
        step: Where the run goes on; lines of later steps, and one that was never ended, are taken out of the file.
    """

    def __init__(self, path: Path, step: int = 0) -> None:
        self.path = path
        if path.exists():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            write_text(path, "".join(f"{line}\n" for line in lines if _step(line) <= step))

    def write(self, values: dict[str, float | int]) -> None:
        """Add a line; a value that is not finite is written as a string, which JSON can hold."""
        plain = {k: v if abs(v) < float("inf") else str(v) for k, v in values.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(plain) + "\n")


class TensorBoard:
    """The same figures for TensorBoard.

    Args:
        folder: For its files.
        step: Where the run goes on; what was written of later steps is not shown any more.

    Raises:
        DinoError: It is not installed.
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise DinoError(
                "TensorBoard's files were asked for; it is not installed", "pip install 'dinocli[tensorboard]'"
            ) from error
        self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, values: dict[str, float | int]) -> None:
        """Add a step's figures."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, int(values["step"]))
        self._writer.flush()


def _step(line: str) -> float:
    """Of a line; infinite where it was never ended or is no line of ours."""
    try:
        step = parse(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
    return step if isinstance(step, int) else math.inf


class Pace:
    """How fast the steps go, and for how much of the time they wait for data, since the last look."""

    def __init__(self) -> None:
        self._images = 0
        self._since = time.perf_counter()
        self._waited = 0.0

    def add(self, images: int) -> None:
        """Count a step's images."""
        self._images += images

    @property
    def elapsed(self) -> float:
        """Seconds since the last look."""
        return time.perf_counter() - self._since

    def look(self, waited: float) -> tuple[float, float]:
        """Images a second, and the share of the time that was waited, since the last look; and start again.

        Args:
            waited: Seconds for data since the start.
        """
        elapsed = max(self.elapsed, 1e-9)
        found = self._images / elapsed, (waited - self._waited) / elapsed
        self._images, self._since, self._waited = 0, time.perf_counter(), waited
        return found
