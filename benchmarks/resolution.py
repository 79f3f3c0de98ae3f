"""Processor seconds of a step at low resolution and at the full one, with the images that are decoded for it.

    python benchmarks/resolution.py IMAGES [--preset tiny] [--set KEY=VALUE ...] [--steps 10] [--rounds 6]

Each part of the run has a trainer of its own, in the middle of its schedules, and images of its own. They take turns,
round after round, in one process and one thread; the ratio is within rounds. What it says of a whole run is that ratio
over the share of the steps that have small crops: such a run takes 1 - share * (1 - ratio) of one without.
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


def turns(images: str, name: str, changes: list[str], views: ViewsConfig, steps: int) -> Iterator[float]:
    """Seconds of a step, on average over one turn, each time they are asked for."""
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
        trainer.step(next(batches))  # the caches were the others' meanwhile
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
    asked = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    changes = asked.changes if any("low_resolution" in change for change in asked.changes) else [LOW, *asked.changes]
    phases = [views for _, views in load_preset(asked.preset, changes).views.phases(1)]
    ways = [turns(asked.images, asked.preset, changes, views, asked.steps) for views in phases]
    rounds = [[next(way) for way in ways] for _ in range(asked.rounds)]
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
