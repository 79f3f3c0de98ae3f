"""Processor seconds of a training step at low and at full resolution, including image decoding.

    python benchmarks/resolution.py IMAGES [--preset tiny] [--set KEY=VALUE ...] [--steps 10] [--rounds 6]

Each phase of the run has its own trainer, in the middle of its schedules, and its own images. The phases take turns,
round after round, in one process and one thread; ratios are within rounds. If a share of a run's steps has small crops,
the run takes 1 - share * (1 - ratio) of the time of a run without.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from rich.console import Console
from rich.table import Table
from ways import WAYS, build

from dinocli.core.device import keep_freed_memory
from dinocli.data.loader.train import TrainBatches
from dinocli.data.sources.open import open_source
from dinocli.data.views.crops import ViewsConfig
from dinocli.method.preset import load_preset

LOW = "views.low_resolution={epochs=1, global_size=32, local_size=16}"


def measure_turns(images: str, name: str, changes: list[str], views: ViewsConfig, steps: int) -> Iterator[float]:
    """Yield the mean seconds of a step over one turn."""
    preset = load_preset(name, changes).model_copy(update={"views": views})
    trainer = build(WAYS[preset.training.precision], preset, torch.device("cpu"))
    batches = iter(
        TrainBatches(
            open_source(images),
            views,
            batch_size=preset.training.batch_size,
            seed=0,
            images=preset.images,
            device=torch.device("cpu"),
            grid=trainer.method.student.backbone.grid,  # type: ignore[union-attr]
        )
    )
    while True:
        trainer.step(next(batches))  # warms the caches, which other phases have used meanwhile
        began = time.process_time()
        for _ in range(steps):
            trainer.step(next(batches))
        yield (time.process_time() - began) / steps


def main() -> None:
    """Measure, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--set", action="append", default=[], dest="changes")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    changes = (
        options.changes if any("low_resolution" in change for change in options.changes) else [LOW, *options.changes]
    )
    phases = [views for _, views in load_preset(options.preset, changes).views.phases(1)]
    ways = [measure_turns(options.images, options.preset, changes, views, options.steps) for views in phases]
    rounds = [[next(way) for way in ways] for _ in range(options.rounds)]
    table = Table("crops", "s a step", "of the full size")
    for views, *seconds in zip(phases, *rounds, strict=True):
        shares = [took / each[-1] for took, each in zip(seconds, rounds, strict=True)]
        table.add_row(
            f"{len(views.globals)}x{views.global_1.size} + {views.locals}x{views.local.size if views.local else 0}",
            f"{statistics.median(seconds):.3f}",
            f"{statistics.median(shares):.2f} [{min(shares):.2f} .. {max(shares):.2f}]",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
