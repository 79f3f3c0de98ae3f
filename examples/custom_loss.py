"""Add a loss: a variance term that keeps the features of a batch apart, as in VICReg.

    python examples/custom_loss.py [STEPS]

A loss is a module with four methods. A loss of the package has a file beside the other losses and a field in
`LossesConfig`, and a preset's table enables it. This script adds a loss without changing the package.

Source: arXiv 2105.04906, equation 1.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from features_in_python import draw
from torch import Tensor, nn

from dinocli.data.loader.batch import Batch
from dinocli.data.loader.train import TrainBatches
from dinocli.data.sources.open import open_source
from dinocli.data.views.masking import PatchMasks
from dinocli.engine.schedules import Clock
from dinocli.engine.trainer import Trainer
from dinocli.method.preset import Preset, load_preset
from dinocli.models.network import Encoding


def variance_loss(cls: Tensor, target: float = 1.0) -> Tensor:  # [B, D] -> []
    """Compute the hinge loss of the standard deviation of each feature below `target`, averaged over features."""
    return torch.relu(target - (cls.float().var(0) + 1e-4).sqrt()).mean()


class VarianceLoss(nn.Module):
    """Mean `variance_loss` of the student's class tokens over the global views."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def targets_for(self, teacher: Encoding, clock: Clock) -> None:
        """Compute targets from the teacher's output on the whole batch; this loss has none."""

    def forward(self, student: Encoding, targets: None, masks: PatchMasks | None) -> Tensor:
        return self.weight * torch.stack([variance_loss(cls) for cls in student.cls[: student.globals]]).mean()

    def metrics(self, targets: None, loss: Tensor, clock: Clock) -> dict[str, Tensor | float]:
        """Return figures to log, as `variance/missing`."""
        return {"missing": loss / self.weight}

    def after_step(self) -> None:
        """Update state after a step; this loss has none."""


def batches(preset: Preset, folder: Path, trainer: Trainer) -> Iterator[Batch]:
    """Yield training batches of drawn images."""
    draw(folder / "photos", count=16)
    source, device = open_source(str(folder / "photos")), torch.device("cpu")
    size, grid = preset.training.batch_size, trainer.method.student.backbone.grid  # type: ignore[union-attr]
    loader = TrainBatches(source, preset.views, batch_size=size, seed=0, images=preset.images, device=device, grid=grid)
    try:
        yield from loader
    finally:
        loader.close()


def main(folder: Path, steps: int = 8) -> list[float]:
    """Train for a few steps; print and return the new loss of each step."""
    torch.manual_seed(0)
    small = "backbone.options={img_size=48, patch_size=8, embed_dim=48, depth=2, num_heads=3}"
    preset = load_preset("tiny", [small, "training.batch_size=8", "optimizer.lr={kind='constant', value=0.003}"])
    method = preset.method()
    method.losses["variance"] = VarianceLoss(weight=1.0)
    trainer = Trainer(method, preset.optimizer, Clock(2, preset.training.epochs), batch_size=preset.training.batch_size)
    seen = []
    for batch in batches(preset, folder, trainer):
        values = trainer.step(batch, log=True)
        seen.append(float(values["variance"]))
        print(f"step {len(seen)}: dino {float(values['dino']):.3f}, variance {seen[-1]:.3f}")
        if len(seen) == steps:
            break
    return seen


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        main(Path(place), int(sys.argv[1]) if len(sys.argv) > 1 else 8)
