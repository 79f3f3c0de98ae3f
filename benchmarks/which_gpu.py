"""Memory and time per number of images in the README: estimates of `--dry-run` for GPUs that are not installed.

    python benchmarks/which_gpu.py

Memory is counted as for bfloat16, on tensors without data. Time is the compute of a step at 30 % of the maker's
bfloat16 peak. That is the share that `--dry-run` assumes of a matrix product, whose rate it measures on the device.
None of it was tested on a GPU.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path
from unittest import mock

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from dinocli.data.sources.open import open_source
from dinocli.method.preset import load_preset
from dinocli.train import cost as costs
from dinocli.train.plan import Plan

PEAKS, EFFICIENCY = (165e12, 312e12), 0.3  # RTX 4090, A100: dense bfloat16 products, by their makers
# Images, prototypes, batch, parts: the settings of `dino doctor` for photos of 350 to 1,000 pixels, and smaller parts.
ROWS = (
    (1_000, 1_024, 32, 1),
    (10_000, 4_096, 128, 1),
    (10_000, 4_096, 128, 4),
    (1_000_000, 65_536, 512, 4),
    (1_000_000, 65_536, 512, 16),
)


def in_bfloat16(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Autocast as on a GPU."""
    return torch.autocast("cpu", dtype=torch.bfloat16)


def main() -> None:
    """Estimate, and print one table."""
    table = Table(
        "images",
        "batch",
        "parts",
        "steps",
        "GFLOP per image",
        "memory, GB",
        *(f"{p / 1e12:.0f} TFLOP/s" for p in PEAKS),
    )
    with (
        tempfile.TemporaryDirectory() as place,
        mock.patch.object(costs, "autocast", in_bfloat16),
        mock.patch.object(costs, "_rate", lambda plan: 1.0),
    ):
        Image.new("RGB", (64, 64)).save(Path(place) / "image.png")
        (Path(place) / "list.txt").write_text("image.png\n" * max(batch for _, _, batch, _ in ROWS))
        source = open_source(str(Path(place) / "list.txt"))
        for images, prototypes, batch, parts in ROWS:
            length = f"training.steps_per_epoch={images // batch}"
            changes = [f"heads.dino.prototypes={prototypes}", f"training.batch_size={batch}", length]
            preset = load_preset("vits16-vanilla", changes)
            steps = preset.training.epochs * (images // batch)
            cpu = torch.device("cpu")
            plan = Plan("vits16-vanilla", preset, source, steps, Path(place), cpu, 0, None, accumulate=parts)
            cost = costs.estimate(plan)
            hours = (f"{cost.seconds / (peak * EFFICIENCY) / 3600:.2f} h" for peak in PEAKS)
            numbers = f"{cost.flops / 1e9:.0f}", f"{cost.memory / 1e9:.1f}", *hours
            table.add_row(f"{images:,}", str(batch), str(parts), f"{steps:,}", *numbers)
    Console().print(table)


if __name__ == "__main__":
    main()
