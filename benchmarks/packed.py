"""Speed-up from passing both resolutions through one call of each linear layer.

    python benchmarks/packed.py [--images 64] [--rounds 5] [--device auto]

Measured are the norms and linear layers of one ViT-S block, forward and backward, on the tokens of 2 global and 8 local
crops per image: for each resolution alone, or for all tokens at once. Attention never mixes crops and is omitted. So is
the cost of concatenating the tokens: the result is an upper bound of the gain.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import time
from collections.abc import Callable, Sequence

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from dinocli.core.device import pick_device
from dinocli.core.errors import DinoError


class Linears(nn.Module):
    """A block without its attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # [S, width]
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        x = x + self.proj(q + k + v)  # replaces attention, so that all three have a gradient
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))


def step(block: nn.Module, groups: Sequence[Tensor], precision: contextlib.AbstractContextManager[None]) -> None:
    with precision:
        outputs = [block(group) for group in groups]
    for out in outputs:
        out.backward(out.detach())


def measure(work: Callable[[], None], times: int, device: torch.device) -> float:
    """Return seconds per call: wall time on a GPU, processor time on a CPU."""
    now = time.perf_counter if device.type == "cuda" else time.process_time
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = now()
    for _ in range(times):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (now() - began) / times


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    try:
        device = pick_device(chosen.device)
    except DinoError as error:
        raise SystemExit(f"error: {error.message}\nhint: {error.hint}") from error
    crops = [(2 * chosen.images, 197), (8 * chosen.images, 37)]
    apart = [torch.randn(b * n, chosen.width, device=device, requires_grad=True) for b, n in crops]
    packed = [torch.cat([group.detach() for group in apart]).requires_grad_()]
    precision = torch.autocast(device.type, torch.bfloat16)
    ways: dict[str, Callable[[], None]] = {}
    for name, compiled in (("", False), (", compiled", True)):
        for kind, groups in (("each resolution alone", apart), ("all tokens at once", packed)):
            block: nn.Module = Linears(chosen.width).to(device)
            if compiled:
                block.compile(dynamic=False)
            ways[kind + name] = lambda block=block, groups=groups: step(block, groups, precision)
    times = 50 if device.type == "cuda" else 3
    for work in ways.values():
        measure(work, 3, device)
    rounds = [{name: measure(work, times, device) for name, work in ways.items()} for _ in range(chosen.rounds)]
    table = Table("one block's linear layers, bfloat16", "ms", "times each alone, not compiled [min .. max]")
    for name in ways:
        ratios = sorted(r[next(iter(ways))] / r[name] for r in rounds)
        spread = f"{statistics.median(ratios):.2f} [{ratios[0]:.2f} .. {ratios[-1]:.2f}]"
        table.add_row(name, f"{1000 * statistics.median(r[name] for r in rounds):.3f}", spread)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
