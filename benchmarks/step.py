"""Time, memory and parts of a training step: a reimplementation of the original's step, and dinocli's.

    python benchmarks/step.py [--preset vits16-vanilla] [--batch-size 8] [--rounds 5] [--images FOLDER]

Each method runs in its own process, so that its peak memory is its own. The processes take turns, round after round,
one at a time; ratios are to the first method within each round. Before that, all methods do two small steps with the
same weights and images, without randomness. Both losses must agree: the second one depends on gradient, clipping,
optimizer and moving average.

The share of the floor is the time that the operations of dinocli's step would take at the rate of a bare matrix
product, over the time of the step. The rate is measured in the same run, in the method's precision. The parts are timed
in further steps, in which the host synchronizes with the device around each part; their sum may exceed the step's time.

On a CPU with one thread and without photos, times are processor time, which other load changes less.
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
    """Measurements of a method.

    Attributes:
        seconds: Seconds of a step, per round.
        ratios: Speed-up over the first method, per round.
        memory: Peak memory of a step, in bytes.
        share: Share of the floor; see above.
        parts: Seconds per part of a step.
        losses: Losses of the two small steps.
        failed: Reason if measurements are missing, else empty.
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
    """Return the operations per second of a large matrix product on random data: the best of 13."""
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
    """Return the floating-point operations per image of dinocli's step."""
    nothing: Any = SimpleNamespace(count=10**6)
    plan = Plan("x", preset, nothing, stop=1, out=Path(), device=device, workers=0, init=None)
    return estimate(plan).flops


def same(losses: dict[str, list[float]]) -> None:
    """Check that the losses of all methods equal those of the first float32 method, or else of the first.

    Raises:
        DinoError: If losses differ.
    """
    by = next((k for k in losses if WAYS[k].precision == "float32"), next(iter(losses), ""))
    for key, found in losses.items():
        allowed = (1e-5, 1e-4) if WAYS[key].precision == WAYS[by].precision == "float32" else (5e-2, 5e-2)
        for loss, wanted, tolerance in zip(found, losses[by], allowed, strict=True):
            if not abs(loss - wanted) <= tolerance * abs(wanted):
                raise DinoError(
                    f"the losses of {WAYS[key].name} are {found}; expected {losses[by]}, those of {WAYS[by].name}",
                    "use --ways without that method, or correct its step",
                )


def measure(keys: list[str], job: Job, rounds: int, note: Callable[[str], None]) -> tuple[list[Row], dict[str, float]]:
    """Measure each method, and the rates of matrix products by precision."""
    device, preset = torch.device(job.device), job.read()
    needed = operations(preset, device) * job.batch_size
    rates = {p: product_rate(device, p, job.now) for p in ("float32", "bfloat16")}
    processes: dict[str, Process] = {}
    losses: dict[str, Any] = {}
    try:
        # The host of a GPU has enough cores to start all processes at once; on a CPU they would compete.
        together = device.type == "cuda"
        for key in keys:
            processes[key] = Process(WAYS[key], job)
            if not together:
                losses[key] = wait_for_start(processes[key], note)
        for key in keys if together else ():
            losses[key] = wait_for_start(processes[key], note)
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


def wait_for_start(process: Process, note: Callable[[str], None]) -> list[float] | None:
    """Wait until a method is ready; return the losses of its two small steps, or None if it failed."""
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
    parser.add_argument("--steps", type=int, help="steps per turn; by default 1 on a CPU and 10 on other devices")
    parser.add_argument(
        "--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="methods to compare with the first one"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--images", help="folder for batches from the loader; by default noise")
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
