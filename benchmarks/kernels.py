"""Profile a training step on a device: the most expensive kernels, and the gaps between them.

    python benchmarks/kernels.py [--way compiled] [--preset vits16-vanilla] [--batch-size 128] [--trace FILE]

On a CPU, the table shows torch's operations instead; gaps between them are negligible.
"""

from __future__ import annotations

import argparse
import os
from collections import defaultdict
from dataclasses import dataclass

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from ways import WAYS, build, made_up

from dinocli.core.device import pick_device
from dinocli.core.errors import DinoError
from dinocli.method.preset import load_preset


@dataclass(frozen=True)
class Kernel:
    """One execution of a kernel; times in microseconds."""

    name: str
    start: float
    end: float


def gaps(kernels: list[Kernel]) -> list[tuple[float, str, str]]:
    """Return the idle times of the device, the longest first: duration, kernel before, and kernel after."""
    idle, last = [], None
    for kernel in sorted(kernels, key=lambda k: k.start):
        if last is not None and kernel.start > last.end:
            idle.append((kernel.start - last.end, last.name, kernel.name))
        if last is None or kernel.end > last.end:
            last = kernel
    return sorted(idle, reverse=True)


def print_kernels(console: Console, kernels: list[Kernel], top: int) -> None:
    spent: dict[str, list[float]] = defaultdict(list)
    for kernel in kernels:
        spent[kernel.name].append(kernel.end - kernel.start)
    total = max(k.end for k in kernels) - min(k.start for k in kernels)
    idle = gaps(kernels)
    table = Table("kernel", "ms", "share", "times")
    for name, each in sorted(spent.items(), key=lambda item: -sum(item[1]))[:top]:
        table.add_row(name[:110], f"{sum(each) / 1000:.3f}", f"{sum(each) / total:.1%}", str(len(each)))
    console.print(table)
    console.print(
        f"{len(kernels)} kernels of {len(spent)} kinds in {total / 1000:.2f} ms; "
        f"idle for {sum(g[0] for g in idle) / 1000:.2f} ms ({sum(g[0] for g in idle) / total:.1%})"
    )
    for length, after, before in idle[:5]:
        console.print(f"  {length / 1000:.3f} ms after {after[:50]}, before {before[:50]}", highlight=False)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", choices=list(WAYS), default="compiled")
    parser.add_argument("--preset", default="vits16-vanilla")
    parser.add_argument("--set", action="append", default=[], dest="changes", metavar="KEY=VALUE")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--top", type=int, default=20)
    parser.add_argument("--trace", help="a .json.gz file for chrome://tracing or Perfetto")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=150)
    try:
        device = pick_device(chosen.device)
        preset = load_preset(chosen.preset, [*chosen.changes, f"training.batch_size={chosen.batch_size}"])
        stepper, batch = build(WAYS[chosen.way], preset, device), made_up(preset, device)
    except DinoError as error:
        raise SystemExit(f"error: {error.message}\nhint: {error.hint}") from error
    on_gpu = device.type == "cuda"
    for _ in range(5 if on_gpu else 1):
        stepper.step(batch)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with profile(activities=activities) as profiler:
        if on_gpu:
            torch.cuda.synchronize()
        stepper.step(batch)
        if on_gpu:
            torch.cuda.synchronize()
    if chosen.trace:
        profiler.export_chrome_trace(chosen.trace)
    console.print(f"{WAYS[chosen.way].name}: a step of {chosen.preset} at {chosen.batch_size} images")
    if on_gpu:
        # The profiler also lists named spans on the device, such as the optimizer's step; they are no kernels.
        on_device = [
            e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation
        ]
        kernels = [Kernel(e.name, e.time_range.start, e.time_range.end) for e in on_device]
        print_kernels(console, kernels, chosen.top)
    else:
        print(
            profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=chosen.top, max_name_column_width=50)
        )


if __name__ == "__main__":
    main()
