"""Adaptation of released weights to a user's images: the recipe, and the verdict at the end."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from dinocli.core.atomic import atomic, write_json
from dinocli.core.config import format_toml
from dinocli.core.errors import DinoError
from dinocli.core.runs import CHECKPOINT, VERDICT
from dinocli.evals.bootstrap import Difference, paired_difference
from dinocli.method.distillation import SelfDistillation
from dinocli.method.preset import Preset
from dinocli.models.backbone import Backbone
from dinocli.models.network import Network
from dinocli.train.best import load_kept
from dinocli.train.knn_monitor import KnnMonitor, class_tokens
from dinocli.train.plan import IMAGES_PER_PROTOTYPE, Plan, power_below
from dinocli.train.snapshots import VIEWS, Photos, measure_spread
from dinocli.weights.checkpoint import write_checkpoint
from dinocli.weights.load import start_from
from dinocli.weights.starting_point import StartingPoint

_WORDS = {"rank": "effective rank", "uniformity": "uniformity", "lidar": "LiDAR"}
RECIPES = {"dinov2": "adapt-dinov2", "dinov3": "adapt-dinov3", "other": "adapt-lora"}
_LARGEST_CROP = 224
_LOCAL = 0.43  # side of a local crop relative to a global one, as 96 to 224
_PASSES, _FEWEST_STEPS, _MOST_STEPS = 20, 400, 10_000
_STEPS_PER_EPOCH = 50  # as in the presets
_VERDICT_IMAGES = 5000  # per split, more than during the run


def recipe(
    start: StartingPoint, preset: Preset, images: int | None, batch_size: int | None, train: str, anchor: float
) -> dict[str, str]:
    """Return the settings that an adaptation changes in its preset, as TOML values by key.

    Args:
        start: Weights to adapt.
        preset: Preset without these settings.
        images: Number of images. If None, it is unknown.
        batch_size: Images per step, if the user chose a number.
        train: `lora`, `lora-RANK`, `last-BLOCKS` or `all`.
        anchor: Weight of the distance from the released features; 0 for none.

    Raises:
        DinoError: If `train` is none of these.
    """
    settings, backbone = network_settings(start)
    patch, side = backbone.patch_size, settings["views.global_1.size"]
    small = max(patch, round(_LOCAL * side / patch) * patch)
    batch = batch_size or _batch_size(preset.training.batch_size, images)
    per_epoch = preset.training.steps_per_epoch or (max(1, images // batch) if images else _STEPS_PER_EPOCH)
    steps = _FEWEST_STEPS if images is None else _PASSES * images // batch
    steps = min(max(steps, _FEWEST_STEPS), _MOST_STEPS)
    prototypes = power_below(steps * batch // IMAGES_PER_PROTOTYPE)
    settings |= {
        "views.global_2.size": side,
        "views.local.size": small,
        "training.epochs": max(2, round(steps / per_epoch)),
        "training.batch_size": batch,
        **{
            f"heads.{name}.prototypes": min(head.prototypes, prototypes)
            for name, head in preset.heads.items()
            if head.prototypes
        },
        **_learning_settings(*parse_train(train)),
    }
    if anchor:
        settings["losses.gram"] = {"weight": {"kind": "constant", "value": anchor}, "class_tokens": 1.0}
    if not _accepts(backbone, len(start.preprocessing.mean), small):
        settings |= {"views.local": None, "views.locals": 0}
        del settings["views.local.size"]
    return {key: format_toml(value) for key, value in settings.items()}


def network_settings(start: StartingPoint) -> tuple[dict[str, Any], Backbone]:
    """Return the settings that weights determine, by key: the backbone, and the images that it expects.

    Returns:
        The settings, and the backbone on the meta device.
    """
    architecture, channels = start.architecture, len(start.preprocessing.mean)
    with torch.device("meta"):
        backbone = architecture.build(drop_path=False).eval()
    patch = backbone.patch_size
    side = max(patch, min(start.preprocessing.size, _LARGEST_CROP) // patch * patch)
    if not _accepts(backbone, channels, side):  # a network for images of one size
        side = start.preprocessing.size
    settings: dict[str, Any] = {
        "backbone.name": architecture.name,
        "backbone.options": dict(architecture.options),
        "backbone.positions": architecture.positions,
        "backbone.stem": architecture.stem,
        "views.mean": list(start.preprocessing.mean),
        "views.std": list(start.preprocessing.std),
        "views.global_1.size": side,
    }
    if images_table := start.images.model_dump(mode="json", exclude_defaults=True):
        settings["images"] = images_table
    return settings, backbone


def _batch_size(usual: int, images: int | None) -> int:
    """Return a smaller batch for few images, so that an epoch has at least two."""
    return usual if images is None else min(usual, power_below(max(2, images // 2)))


def parse_train(train: str) -> tuple[str, int | None]:
    """Return the kind of --train, `lora`, `last` or `all`, and its rank or number of blocks.

    Raises:
        DinoError: If it is none of these.
    """
    found = re.fullmatch(r"(lora|last|all)(?:-([1-9]\d*))?", train.strip().lower())
    kind, number = found.groups() if found else ("", None)
    if not found or (kind == "last" and not number) or (kind == "all" and number):
        raise DinoError(f"--train {train} is not valid; expected lora, lora-RANK, last-BLOCKS or all", "--train lora")
    return kind, int(number) if number else None


def _learning_settings(kind: str, number: int | None) -> dict[str, object]:
    """Return the settings of --train.

    Rates were chosen for a batch of 1,024 and follow the square root of the batch. All weights need a lower rate than
    LoRA, the lower the earlier the block, and a slower average: a released backbone is easily destroyed.
    """
    trained = "backbone.learning.trained"
    if kind == "lora":
        return {trained: {"kind": "lora", "rank": number or 16}}
    if kind == "last":
        return {trained: {"kind": "last", "blocks": number or 1}, "optimizer.lr.start": 5e-4}
    return {
        trained: {"kind": "all"},
        "backbone.learning.layer_decay": 0.9,
        "backbone.learning.patch_embed": 0.2,
        "optimizer.lr.start": 4e-4,
        "teacher.momentum.start": 0.996,
    }


def _accepts(backbone: Backbone, channels: int, size: int) -> bool:
    """Return True if a backbone on the meta device takes images of this size."""
    try:
        backbone.class_tokens(torch.empty(1, channels, size, size, device="meta"))
    except DinoError:
        return False
    return True


@dataclass(frozen=True)
class Conclusion:
    """Result of an adaptation.

    Attributes:
        step: Step of the kept weights; 0 stands for the released ones.
        difference: Difference in k-NN accuracy between the released and the best weights. None without a monitor.
        figures: Label-free figures of the released and of the new weights on the same photos, by name: `rank`,
            `uniformity` and `lidar`.
    """

    step: int
    difference: Difference | None
    figures: dict[str, tuple[float, float]]

    @property
    def rows(self) -> list[list[str]]:
        """Rows of a table: figure, released weights, new weights, difference."""
        rows = []
        if knn := self.difference:
            change = f"{knn.mean:+.1f} ({knn.low:+.1f} to {knn.high:+.1f})"
            # The progress line has other images, because some of them chose the step.
            rows.append(["k-NN of the verdict's images, %", f"{knn.before:.1f}", f"{knn.after:.1f}", change])
        for name, (before, after) in self.figures.items():
            rows.append([_WORDS[name], f"{before:.2f}", f"{after:.2f}", f"{after - before:+.2f}"])
        return rows

    @property
    def verdict(self) -> str:
        """Verdict in a sentence."""
        if self.difference is None:
            return "no verdict without labels: --monitor DIR compares the weights on labelled images"
        kept = f"{CHECKPOINT} holds step {self.step}"
        if self.difference.verdict == "worse":
            return f"verdict: worse (the released weights are kept as {CHECKPOINT})"
        zero = ", the released weights: no later step was better on the images for selection" if not self.step else ""
        return f"verdict: {self.difference.verdict}; {kept}{zero}"


def conclude(plan: Plan) -> Conclusion:
    """Compare a finished adaptation with its released weights, and write the better ones as `ckpt.safetensors`.

    With a monitor, the new weights are the best of the run by its images for selection, and the verdict comes from
    other images. Without one, they are the last.

    Raises:
        DinoError: If the released weights no longer exist.
    """
    released, adapted = _released(plan), plan.preset.network()
    weights, step = load_kept(adapted, plan.out, best=plan.monitor is not None)
    for network in (released, adapted):
        network.eval().to(plan.device)
    figures = _figures(plan, released, adapted)
    if not plan.monitor:
        return _report(plan, Conclusion(step, None, figures))
    monitor = KnnMonitor(plan.monitor, plan.preset, plan.workers, _VERDICT_IMAGES)
    before, after = (monitor.evaluate(network).verdict for network in (released, adapted))
    difference = paired_difference(before, after)
    if difference.verdict == "worse":
        step, weights = 0, released.weights()
    with atomic(plan.out / CHECKPOINT) as draft:
        write_checkpoint(draft, weights, plan.preset, step)
    return _report(plan, Conclusion(step, difference, figures))


def _report(plan: Plan, result: Conclusion) -> Conclusion:
    """Write the result into the run folder and its report."""
    write_json(plan.out / VERDICT, {"step": result.step, "verdict": result.verdict, "rows": result.rows}, indent=2)
    if plan.report:
        from dinocli.viz.report import write_report  # only here: it imports matplotlib

        write_report(plan.out)
    return result


def _released(plan: Plan) -> Network:
    method = plan.method()
    assert plan.init and isinstance(method, SelfDistillation)
    start_from(method, plan.init, weights=plan.initial)
    return method.average


def _figures(plan: Plan, released: Network, adapted: Network) -> dict[str, tuple[float, float]]:
    pool = Photos.of(plan.source, plan.preset).pool
    if len(pool) < 2:
        return {}
    before, after = (
        measure_spread(network, pool, class_tokens(network, pool, plan.preset.views), plan.preset.views, VIEWS)
        for network in (released, adapted)
    )
    return {name: (before[name], after[name]) for name in before}
