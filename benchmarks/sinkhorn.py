"""Seconds and launches of Sinkhorn-Knopp: every iteration in logarithms, as before, and dinocli's.

    python benchmarks/sinkhorn.py [--samples 1024] [--prototypes 65536] [--iterations 3] [--threads 1] [--rounds 5]

Before, each iteration rewrote the matrix twice. Now the first one is a logsumexp and a softmax, and each further one is
two products of the matrix with a vector. Both run in turn, round after round; the ratio is within a round. On a CPU,
seconds are processor time. An operator that reads or writes the matrix counts as one pass, though a logsumexp reads it
several times, and the launches are those of launches.py. The largest relative error is to float64, over targets above
1e-30.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from launches import Launches
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._pytree import tree_leaves

from dinocli.engine.schedules import Clock, Constant
from dinocli.method.losses.targets import SinkhornKnoppConfig

TEMPERATURE = 0.07


class Passes(Launches):
    """Counter of launches, and of those that read or write a tensor of at least some size."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.numbers, self.passes = numbers, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.counts.total()
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if self.counts.total() > before:
            tensors = [leaf for leaf in tree_leaves((args, result)) if isinstance(leaf, Tensor)]
            self.passes += any(tensor.numel() >= self.numbers for tensor in tensors)
        return result


def in_logarithms(logits: Tensor, iterations: int) -> Tensor:
    """Return the targets as before: each iteration subtracts the logsumexp of the columns, then of the rows."""
    scaled = logits / TEMPERATURE
    for _ in range(iterations):
        scaled -= scaled.logsumexp(0)
        scaled -= scaled.logsumexp(-1, keepdim=True)
    return scaled.exp_()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--prototypes", type=int, default=65_536)
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    temperature = Constant(kind="constant", value=TEMPERATURE)
    config = SinkhornKnoppConfig(kind="sinkhorn_knopp", iterations=chosen.iterations, temperature=temperature)
    rule = config.build(chosen.prototypes)
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "in logarithms": lambda logits: in_logarithms(logits, chosen.iterations),
        "this": lambda logits: rule(logits, Clock(1, 1)),
    }
    logits = torch.randn(chosen.samples, chosen.prototypes).mul_(0.3).clamp_(-1, 1).to(chosen.device)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(chosen.rounds + 1):
        for name, way in ways.items():
            start = _now(chosen.device)
            way(logits)
            seconds[name].append(_now(chosen.device) - start)
    some = logits[:, :4096]
    exact = in_logarithms(some.double(), chosen.iterations)
    is_large = exact > 1e-30
    table = Table(
        "way", "ms", "times faster", "launches", "passes", "largest relative error",
        title=f"{chosen.samples} x {chosen.prototypes}, {chosen.iterations} iterations, {chosen.device}",
    )  # fmt: skip
    for name, way in ways.items():
        with Passes(logits.numel()) as count:
            way(logits)
        times = seconds[name][1:]  # the first round warms up
        ratios = sorted(a / b for a, b in zip(seconds["in logarithms"][1:], times, strict=True))
        error = ((way(some).double() - exact).abs() / exact)[is_large].max()
        table.add_row(
            name, f"{1000 * statistics.median(times):.1f}",
            f"{statistics.median(ratios):.2f} [{ratios[0]:.2f} .. {ratios[-1]:.2f}]",
            str(count.counts.total()), str(count.passes), f"{error:.1e}",
        )  # fmt: skip
    Console(width=120).print(table)


def _now(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
