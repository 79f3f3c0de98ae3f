"""k-NN of a small student taught by a larger network's features, against its own self-supervised training.

    python benchmarks/distill_features.py IMAGES TEACHER [--steps 2000] [--seeds 3] [--set KEY=VALUE ...]

IMAGES has `train` and `val` with class folders, such as imagenette-128; TEACHER is any source of `--teacher`, such as a
run of `tiny-dinov2`. The student has half of `tiny`'s width. Ways, each with the same seeds:

* alone: `--preset`, without a teacher;
* taught: `distill-features` with as many images per step and as many steps;
* taught, same time: as many steps as fit the time of `alone`, at least ten;
* taught, stored: as `taught`, with `--cache-teacher` and four fixed views per image.

Time is the wall time of the training steps, apart from the first, without evaluation: run nothing else meanwhile. The
table gives k-NN (k = 20) on `val` for each way: mean and range over the seeds, and the difference from `alone`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from rich.console import Console
from rich.table import Table

from dinocli.core.device import keep_freed_memory, pick_device
from dinocli.data.sources.open import open_source
from dinocli.method.preset import Preset, load_preset
from dinocli.train.knn_monitor import KnnMonitor
from dinocli.train.plan import Plan
from dinocli.train.pretrain import pretrain
from dinocli.weights.checkpoint import read_weights
from dinocli.weights.feature_teachers import FeatureTeachers

STUDENT = "{img_size=48, patch_size=8, embed_dim=48, depth=4, num_heads=3}"
JITTER = "{probability=0.8, brightness=0.2, contrast=0.2, saturation=0.1, hue=0.02}"
VIEWS = f"{{size=48, scale=[0.14, 1.0], flip=0.5, jitter={JITTER}}}"
FIXED = 4  # views of each image that are stored


@dataclass(frozen=True)
class Outcome:
    """Result of a run.

    Attributes:
        knn: k-NN accuracy on the evaluation set, in percent.
        seconds: Wall time of all steps, estimated from all but the first logged ones.
        preparation: Seconds before the first step: statistics of the features, or writing them.
    """

    knn: float
    seconds: float
    preparation: float


def presets(options: argparse.Namespace) -> tuple[Preset, Preset]:
    """Return the recipe of the student alone and the one with a teacher, for equal steps and images per step."""
    length = [f"training.steps_per_epoch={max(1, options.steps // 10)}", "training.epochs=10"]
    network = [f"backbone.options={options.student}", f"training.batch_size={options.batch_size}"]
    alone = load_preset(options.preset, [*length, *network, *options.changes])
    momentum = "teacher.momentum={kind='cosine', start=0.98, end=1.0}"
    taught = load_preset(
        "distill-features",
        [
            *length,
            *network,
            "backbone.name=vit_tiny_patch16_224",
            f"views.global_1={VIEWS}",
            "training.precision=float32",
            "optimizer.lr.start=0.004",
            "optimizer.lr.warmup_epochs=1",
            "losses.features.adaptor={kind='mlp', hidden=192, layers=2}",
            momentum,
            *options.taught,
        ],
    )
    return alone, taught


def train(plan: Plan, monitor: KnnMonitor) -> Outcome:
    """Run a plan in its folder, and evaluate the network that it exports."""
    began = time.perf_counter()
    logged: list[tuple[int, float]] = []
    run = pretrain(plan, lambda progress: logged.append((progress.step, time.perf_counter())))
    network = plan.preset.network()
    weights = read_weights(run.folder).backbone
    network.backbone.model.load_state_dict(weights)
    (first, start), (last, end) = logged[0], logged[-1]
    seconds = (end - start) / max(1, last - first) * plan.stop
    knn = monitor.evaluate(network.to(plan.device)).accuracy
    return Outcome(knn, seconds, max(0.0, start - began - seconds / max(1, plan.stop)))


def measure(options: argparse.Namespace, folder: Path) -> dict[str, list[Outcome]]:
    """Train every way with every seed."""
    device = pick_device(options.device)
    source = open_source(str(Path(options.images) / "train"))
    alone, taught = presets(options)
    teachers = FeatureTeachers.read([options.teacher])
    monitor = KnnMonitor(options.images, alone, options.workers)
    found: dict[str, list[Outcome]] = {}

    def add(way: str, plan: Plan) -> Outcome:
        outcome = train(plan, monitor)
        found.setdefault(way, []).append(outcome)
        print(f"{way}: {outcome}", flush=True)
        return outcome

    for seed in range(options.seeds):
        ours, theirs = (seeded(preset, seed) for preset in (alone, taught))
        base = Plan("x", ours, source, options.steps, folder / f"alone-{seed}", device, options.workers, None)
        own = add("alone", base)
        with_teacher = replace(base, preset=theirs, teacher=teachers)
        equal = add("taught", replace(with_teacher, out=folder / f"taught-{seed}"))
        fitting = max(10, round(options.steps * own.seconds / equal.seconds))
        shorter = at_length(theirs, fitting)
        add(
            f"taught, same time ({fitting} steps)" if options.seeds == 1 else "taught, same time",
            replace(with_teacher, preset=shorter, stop=shorter_stop(shorter), out=folder / f"time-{seed}"),
        )
        fixed = theirs.model_copy(update={"views": theirs.views.model_copy(update={"fixed": FIXED})})
        add(
            "taught, stored",
            replace(with_teacher, preset=fixed, out=folder / f"stored-{seed}", teacher_cache=folder / "features"),
        )
    return found


def seeded(preset: Preset, seed: int) -> Preset:
    """Return a preset with another seed."""
    return preset.model_copy(update={"training": preset.training.model_copy(update={"seed": seed})})


def at_length(preset: Preset, steps: int) -> Preset:
    """Return a preset whose schedules span about `steps` steps."""
    each = max(1, steps // preset.training.epochs)
    return preset.model_copy(update={"training": preset.training.model_copy(update={"steps_per_epoch": each})})


def shorter_stop(preset: Preset) -> int:
    """Return the number of steps of a preset with a fixed epoch."""
    assert preset.training.steps_per_epoch is not None
    return preset.training.steps_per_epoch * preset.training.epochs


def show(found: dict[str, list[Outcome]]) -> None:
    """Print one table and one line of JSON."""
    table = Table("way", "k-NN, %", "range", "minus alone", "s of steps", "s before")
    base = statistics.mean(outcome.knn for outcome in found["alone"])
    for way, outcomes in found.items():
        scores = [outcome.knn for outcome in outcomes]
        mean = statistics.mean(scores)
        table.add_row(
            way,
            f"{mean:.2f}",
            f"{min(scores):.2f} .. {max(scores):.2f}",
            f"{mean - base:+.2f}",
            f"{statistics.mean(o.seconds for o in outcomes):.1f}",
            f"{statistics.mean(o.preparation for o in outcomes):.1f}",
        )
    Console().print(table)
    print(json.dumps({way: [vars(outcome) for outcome in outcomes] for way, outcomes in found.items()}))


def main() -> None:
    """Measure, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images")
    parser.add_argument("teacher")
    parser.add_argument("--preset", default="tiny", help="recipe of the student alone")
    parser.add_argument("--student", default=STUDENT, help="backbone.options of the student")
    parser.add_argument("--set", action="append", default=[], dest="changes", help="settings of the recipe alone")
    parser.add_argument("--set-taught", action="append", default=[], dest="taught", help="settings of distill-features")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    torch.set_num_threads(max(1, (os.cpu_count() or 2) - options.workers))
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        show(measure(options, Path(folder)))


if __name__ == "__main__":
    main()
