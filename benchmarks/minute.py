"""k-NN accuracy of a preset after a fixed number of processor seconds, and of its untrained network.

    python benchmarks/minute.py DATA [--preset tiny] [--seconds 150] [--seeds 3] [--threads 1] [--set KEY=VALUE]

DATA holds `train` and `val` with class folders. Two short runs first measure the cost of a step; the preset's epochs
are then chosen to fill the time, with its schedules over all of them. The time is that of the whole command
`dino pretrain`, its start and its workers included. Features are extracted in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from against_original import train
from rich.console import Console
from rich.table import Table

_SHORT, _LONG = 5, 35  # steps of the two runs that measure the cost of a step


class Run(NamedTuple):
    """Measured result of one run.

    Attributes:
        seconds: Processor seconds of the command.
        steps: Number of steps.
        knn: k-NN accuracy (k = 20) in percent.
    """

    seconds: float
    steps: int
    knn: float


class Bench:
    """Runs of `dino` on labelled images, each in a folder of its own.

    Args:
        data: Folder with `train` and `val`.
        folder: Folder for runs and features.
        settings: Words of `dino pretrain` that choose preset and settings.
    """

    def __init__(self, data: Path, folder: Path, settings: Sequence[str]) -> None:
        self.data, self.folder, self.settings = data, folder, settings
        self.run = folder  # the newest run
        self._runs = 0

    def pretrain(self, *words: str) -> float:
        """Train a new `run`; return the processor seconds."""
        self._runs += 1
        self.run = self.folder / f"run-{self._runs}"
        options = [*self.settings, *words, "--workers", "0", "--no-report", "--out", str(self.run)]
        return self._dino("pretrain", str(self.data / "train"), *options)

    def knn(self) -> float:
        """Return the k-NN accuracy of `run`."""
        features = f"{self.run}-features"
        self._dino("extract", str(self.run), str(self.data), "--precision", "float32", "--out", features)
        command = [sys.executable, "-m", "dinocli", "knn", "--features", features, "--k", "20", "--json"]
        found = subprocess.run(command, check=True, capture_output=True)
        return float(json.loads(found.stdout)["scores"][0]["top1"])

    def _dino(self, command: str, *words: str) -> float:
        return train([sys.executable, "-m", "dinocli", command, *words, "--device", "cpu"], self.folder / "log.txt")[0]


def main(words: Sequence[str] | None = None) -> list[Run]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args(words)
    os.environ |= {"OMP_NUM_THREADS": str(options.threads), "OMP_WAIT_POLICY": "PASSIVE"}
    settings = ["--preset", options.preset, *(word for each in options.set for word in ("--set", each))]
    runs: list[Run] = []
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(options.data, Path(name), settings)
        bench.pretrain("--steps", "0")
        untrained = bench.knn()
        short, long = (bench.pretrain("--steps", str(steps)) for steps in (_SHORT, _LONG))
        step = (long - short) / (_LONG - _SHORT)
        preset = json.loads((bench.run / "preset.json").read_text())["training"]
        per_epoch = preset["steps_per_epoch"] or _count(options.data / "train") // preset["batch_size"]
        epochs = max(1, round((options.seconds - short + _SHORT * step) / step / per_epoch))
        for seed in range(options.seeds):
            seconds = bench.pretrain("--epochs", str(epochs), "--seed", str(seed))
            runs.append(Run(seconds, epochs * per_epoch, bench.knn()))
            print(f"seed {seed}: {runs[-1]}", flush=True)
    table = Table("preset", "steps", "processor s", "k-NN, %", "untrained, %")
    knn = [run.knn for run in runs]
    table.add_row(
        options.preset,
        str(runs[0].steps),
        f"{statistics.mean(run.seconds for run in runs):.0f}",
        f"{statistics.mean(knn):.1f} ({min(knn):.1f} to {max(knn):.1f})",
        f"{untrained:.1f}",
    )
    Console().print(table)
    return runs


def _count(folder: Path) -> int:
    return sum(path.is_file() for path in folder.rglob("*"))


if __name__ == "__main__":
    main()
