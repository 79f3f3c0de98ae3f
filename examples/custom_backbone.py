"""Pretrain a backbone of your own: register it with timm, and name it in a preset.

    python examples/custom_backbone.py [STEPS]

Every vision transformer and convolutional network of timm works by its name alone:
`dino pretrain IMAGES --preset tiny --set backbone.name=NAME`. This script adds a network that timm lacks: a ViT with
SwiGLU layers. The command line does not know it, so the script starts the run from Python.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from features_in_python import draw
from timm.layers import SwiGLU
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer

from dinocli.data.sources.open import open_source
from dinocli.method.preset import load_preset
from dinocli.train.plan import Plan
from dinocli.train.pretrain import Run, pretrain


@register_model
def vit_swiglu_example(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """Build a ViT whose MLPs are SwiGLU layers."""
    for key in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        options.pop(key, None)
    return VisionTransformer(mlp_layer=SwiGLU, mlp_ratio=8 / 3, **options)


# Changes to the shipped preset, as for `--set`. A .toml of your own can hold the same settings.
CHANGES = (
    "backbone.name=vit_swiglu_example",
    "backbone.options={img_size=48, patch_size=8, embed_dim=96, depth=2, num_heads=6}",
    "training.batch_size=4",
    "training.epochs=2",
    "optimizer.lr.warmup_epochs=0",
)


def main(folder: Path, steps: int = 3) -> Run:
    """Train for a few steps on drawn images, and return the run."""
    draw(folder / "photos", count=16)
    preset = load_preset("tiny", CHANGES)
    source = open_source(str(folder / "photos"))
    device = torch.device("cpu")
    plan = Plan("swiglu", preset, source, steps, folder / "run", device, workers=0, init=None)
    run = pretrain(plan, lambda progress: print(f"step {progress.step}: {progress.note}"))
    print(f"weights: {run.checkpoint}")
    return run


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        main(Path(place), int(sys.argv[1]) if len(sys.argv) > 1 else 3)
