"""Seconds, memory and parts of a training step: the original's step written out plainly, and this tool's.

    python benchmarks/step.py [--preset vits16-vanilla] [--batch-size 8] [--rounds 5] [--images FOLDER]

Each way is a process of its own, so that the peak of memory is its own. They take turns, round after round, one at a
time, while the others wait; the ratio is that to the first way within each round. Before that, all ways do two small
steps from the same weights on the same images, without what is drawn at random: they must agree in both losses, the
second of which tells whether gradient, clip, optimizer and moving average are the same too.

The share of the floor is the operations that this tool's step needs, whichever way does it, over the rate of a bare
matrix product in the way's precision, measured in the same run. The parts are timed in further steps, in which the
host waits for the device at the beginning and end of each; their sum may so be more than the step's time.

On a CPU in one thread, and without photos, seconds are the processor's, which a busy machine lengthens less.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from rich.console import Console
from rich.table import Table
from stopwatch import PARTS
from turns import Process
from ways import WAYS, Job, Precision

from dinocli.core.device import pick_device
from dinocli.core.errors import DinoError
from dinocli.method.preset import Preset
from dinocli.train.cost import estimate
from dinocli.train.plan import Plan


@dataclasses.dataclass(frozen=True)
class Row:
    """What was found of a way.

    Attributes:
        seconds: Of a step, by round.
        ratios: Of the first way's seconds to its own, by round.
        memory: Bytes at the peak of a step.
        share: Of the floor.
        parts: Seconds by part.
        losses: Of the first two steps.
        failed: Why there is nothing, or not all of it, if it is so.
    """

    way: str
    seconds: list[float]
    ratios: list[float]
    images_per_second: float
    memory: int
    share: float
    parts: dict[str, float]
    losses: list[float]
    failed: str = ""


def product_rate(device: torch.device, precision: Precision, now: Callable[[], float]) -> float:
    """Operations a second of a large matrix product on random data: the best of ten."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    side = (8192 if dtype == torch.bfloat16 else 4096) if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = math.inf
    for _ in range(13):
        began = now()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, now() - began)
    return 2 * side**3 / best


def operations(preset: Preset, device: torch.device) -> float:
    """Floating-point operations that this tool's step needs an image."""
    nothing: Any = SimpleNamespace(count=10**6)
    plan = Plan("x", preset, nothing, stop=1, out=Path(), device=device, workers=0, init=None)
    return estimate(plan).flops


def same(losses: dict[str, list[float]]) -> None:
    """See that all ways do the same steps as the first one in float32, or as the first.

    Raises:
        DinoError: They do not.
    """
    by = next((k for k in losses if WAYS[k].precision == "float32"), next(iter(losses), ""))
    for key, found in losses.items():
        allowed = (1e-5, 1e-4) if WAYS[key].precision == WAYS[by].precision == "float32" else (5e-2, 5e-2)
        for loss, wanted, tolerance in zip(found, losses[by], allowed, strict=True):
            if not abs(loss - wanted) <= tolerance * abs(wanted):
                raise DinoError(
                    f"the same loss of all ways was wanted; {WAYS[by].name} has {losses[by]}, {WAYS[key].name} {found}",
                    "what does not do the same has no time to be compared",
                )


def measure(keys: list[str], job: Job, rounds: int, note: Callable[[str], None]) -> tuple[list[Row], dict[str, float]]:
    """What each way takes, and the rates of matrix products by precision."""
    device, preset = torch.device(job.device), job.read()
    needed = operations(preset, device) * job.batch_size
    rates = {p: product_rate(device, p, job.now) for p in ("float32", "bfloat16")}
    processes: dict[str, Process] = {}
    losses: dict[str, Any] = {}
    try:
        # A GPU's host has the cores to begin all at once; here they would be in each other's way.
        together = device.type == "cuda"
        for key in keys:
            processes[key] = Process(WAYS[key], job)
            if not together:
                losses[key] = begun(processes[key], note)
        for key in keys if together else ():
            losses[key] = begun(processes[key], note)
        same({key: found for key, found in losses.items() if found})
        turns: list[dict[str, Any]] = []
        for i in range(rounds):
            turns.append({key: process.ask("seconds") for key, process in processes.items()})
            note(f"round {i + 1} of {rounds}")
        memory = {key: process.ask("memory") for key, process in processes.items()}
        parts = {key: process.ask("parts") for key, process in processes.items()}
    finally:
        for process in processes.values():
            process.end()
    rows = []
    for key, process in processes.items():
        seconds = [turn[key] for turn in turns if turn[key]]
        ratios = [turn[keys[0]] / turn[key] for turn in turns if turn[key] and turn[keys[0]]]
        if not seconds:
            rows.append(Row(process.way.name, [], [], 0, 0, 0, {}, losses[key] or [], process.failed))
            continue
        each = statistics.median(seconds)
        share = needed / each / rates[process.way.precision]
        rows.append(
            Row(
                way=process.way.name,
                seconds=seconds,
                ratios=ratios,
                images_per_second=job.batch_size / each,
                memory=memory[key] or 0,
                share=share,
                parts=parts[key] or {},
                losses=losses[key],
                failed=process.failed,
            )
        )
    return rows, rates | {"operations": needed}


def begun(process: Process, note: Callable[[str], None]) -> list[float] | None:
    """The first losses of a way that is ready."""
    losses = process.answer()
    process.answer()
    note(f"{process.way.name}: {process.failed or 'ready'}")
    return losses


def spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} [{min(ratios):.2f} .. {max(ratios):.2f}]"


def show(console: Console, rows: list[Row]) -> None:
    table = Table(
        "way", "s a step", "times the first [min .. max]", "images/s", "share of the floor", "peak memory, GB"
    )
    parts = Table("milliseconds of", *PARTS)
    for row in rows:
        if row.failed:
            console.print(f"{row.way}: {row.failed}")
        if not row.seconds:
            continue
        ratio = spread(row.ratios) if row.ratios else ""
        memory = f"{row.memory / 1e9:.2f}" + (f" ({row.memory / rows[0].memory:.2f})" if rows[0].memory else "")
        each = statistics.median(row.seconds)
        table.add_row(row.way, f"{each:.4g}", ratio, f"{row.images_per_second:.4g}", f"{row.share:.1%}", memory)
        parts.add_row(row.way, *(f"{1000 * seconds:.2f}" for seconds in row.parts.values()))
    console.print(table, parts)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # The original's defaults, which clip: 2x224 + 8x96 crops of ViT-S/16, 65,536 prototypes.
    parser.add_argument("--preset", default="vits16-vanilla")
    parser.add_argument("--set", action="append", default=[], dest="changes", metavar="KEY=VALUE")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="in each turn; 1 on a CPU and 10 elsewhere unless told")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="the first is compared with")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--images", help="a folder, for batches from the loader; noise unless given")
    parser.add_argument("--json", action="store_true", help="figures on stdout, tables on stderr")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    words = Console(stderr=True, width=150)
    try:
        device = str(pick_device(chosen.device))
        steps = chosen.steps or (1 if device == "cpu" else 10)
        changes = tuple(chosen.changes)
        job = Job(chosen.preset, changes, chosen.batch_size, device, chosen.threads, chosen.images, steps)
        rows, rates = measure(chosen.ways, job, chosen.rounds, lambda line: words.print(line, style="dim"))
    except DinoError as error:
        raise SystemExit(f"error: {error.message}\nhint: {error.hint}") from error
    tables = words if chosen.json else Console(width=150)
    show(tables, rows)
    chip = torch.cuda.get_device_name() if device.startswith("cuda") else f"a CPU with --threads {chosen.threads}"
    tables.print(
        f"{' '.join([chosen.preset, *changes])} at {chosen.batch_size} images on {chip}, torch {torch.__version__}; "
        f"a step needs {rates['operations'] / 1e9:.4g} GFLOP; a matrix product does {rates['float32'] / 1e12:.3g} "
        f"TFLOP/s in float32 and {rates['bfloat16'] / 1e12:.3g} in bfloat16; "
        f"{'processor time' if job.processor_time else 'time'}, {chosen.rounds} rounds of {steps}"
    )
    if chosen.json:
        print(
            json.dumps({"job": dataclasses.asdict(job), "rates": rates, "rows": [dataclasses.asdict(r) for r in rows]})
        )
    if any(row.failed for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
