"""k-NN on the old and the new images after ways of continuing from a backbone.

    python benchmarks/adapt.py START OLD NEW [--preset adapt-lora] [--seeds 3] [--steps 300] [--locals 4]

START is a run or a checkpoint; OLD and NEW hold `train` and `val` with class folders. Ways, each with the same images,
views, heads, losses and steps (those of --preset):

* naive: all weights at the preset's own rate from the first step;
* last: the last quarter of the blocks, after an epoch in which only the heads learn (`--train last-N`);
* lora: the default of `dino adapt`;
* anchored: all weights as `--train all --anchor 1`.

The table gives k-NN (k = 20, up to 5,000 images per split) of the last weights: mean and range over the seeds, with the
difference from START in parentheses, and the memory of a step by `dino adapt --dry-run`'s estimate, relative to naive.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from rich.console import Console
from rich.table import Table

from dinocli.core.device import keep_freed_memory
from dinocli.data.sources.open import open_source
from dinocli.method.preset import Preset, load_preset
from dinocli.models.network import Network
from dinocli.train.adapt import recipe
from dinocli.train.cost import estimate
from dinocli.train.knn_monitor import KnnMonitor
from dinocli.train.plan import Plan
from dinocli.train.pretrain import pretrain
from dinocli.weights.checkpoint import read_weights
from dinocli.weights.starting_point import StartingPoint, read_starting_point

_IMAGES = 5000


def preset_of(way: str, start: StartingPoint, images: int, options: argparse.Namespace) -> Preset:
    """Return the recipe of a way."""
    blocks = max(1, int(start.architecture.options.get("depth", 12)) // 4)
    train = {"naive": "all", "last": f"last-{blocks}", "lora": "lora", "anchored": "all"}[way]
    anchor = 1.0 if way == "anchored" else 0.0
    chosen = recipe(start, load_preset(options.preset), images, options.batch_size, train, anchor)
    chosen["training.epochs"] = str(max(2, options.steps // 50))
    if way == "naive":
        for key in ("backbone.learning.layer_decay", "backbone.learning.patch_embed"):
            del chosen[key]
        del chosen["optimizer.lr.start"], chosen["teacher.momentum.start"]
        chosen["backbone.learning.frozen_epochs"] = "0"
    else:
        chosen["backbone.learning.frozen_epochs"] = "1"
    settings = [f"{key}={value}" for key, value in chosen.items()] + [f"views.locals={options.locals}"]
    return load_preset(options.preset, [*settings, *options.changes])


def accuracies(network: Network, monitors: list[KnnMonitor]) -> list[float]:
    """Return the accuracy on the old and on the new images."""
    return [monitor.evaluate(network).accuracy for monitor in monitors]


def load(preset: Preset, path: Path) -> Network:
    """Return the network of a checkpoint, without trained heads."""
    network = preset.network().eval()
    network.backbone.model.load_state_dict(read_weights(path).backbone)
    return network


def main(words: list[str] | None = None) -> dict[str, list[list[float]]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("start", type=Path)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--ways", nargs="+", default=["naive", "last", "lora", "anchored"])
    parser.add_argument("--preset", default="adapt-lora")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--locals", type=int, default=4)
    parser.add_argument("--set", dest="changes", action="append", default=[])
    options = parser.parse_args(words)
    keep_freed_memory()
    start, source = read_starting_point(str(options.start)), open_source(str(options.new / "train"))
    base = preset_of("naive", start, source.count or 0, options)
    monitors = [KnnMonitor(str(folder), base, 0, _IMAGES) for folder in (options.old, options.new)]
    before = accuracies(load(base, options.start), monitors)
    print(f"before: old {before[0]:.2f}, new {before[1]:.2f}", flush=True)
    found: dict[str, list[list[float]]] = {way: [] for way in options.ways}
    memory: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.seeds):
            for way in options.ways:
                made = preset_of(way, start, source.count or 0, options)
                made = made.model_copy(update={"training": made.training.model_copy(update={"seed": seed})})
                out = Path(folder) / f"{way}-{seed}"
                total = made.training.epochs * (made.training.steps_per_epoch or 1)
                plan = Plan("adapt", made, source, total, out, torch.device("cpu"), 0, str(options.start), cache="ram")
                memory.setdefault(way, estimate(plan).memory)
                pretrain(plan, lambda progress: None)
                found[way].append(accuracies(load(made, out), monitors))
                print(f"seed {seed} {way}: old {found[way][-1][0]:.2f}, new {found[way][-1][1]:.2f}", flush=True)
    table = Table("way", "old", "new", "memory", title=f"before: old {before[0]:.1f}, new {before[1]:.1f}")
    for way, pairs in found.items():
        cells = []
        for values, first in zip(zip(*pairs, strict=True), before, strict=True):
            mean = statistics.mean(values)
            cells.append(f"{mean:.1f} ({mean - first:+.1f}), {min(values):.1f} to {max(values):.1f}")
        ratio = f"{memory[way] / memory['naive']:.2f}" if "naive" in memory else ""
        table.add_row(way, *cells, ratio)
    Console().print(table)
    return found


if __name__ == "__main__":
    main()
