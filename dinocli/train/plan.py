"""Plan: the settings of a run, computed and checked before it starts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from dinocli.core.device import TrainingPrecision, training_precision
from dinocli.core.distributed import size
from dinocli.core.errors import DinoError
from dinocli.data.sources.clips import clips_of
from dinocli.data.sources.open import PackedImages, Source
from dinocli.data.sources.shards import Shards
from dinocli.data.views.crops import ViewsConfig
from dinocli.engine.parallel import Kind
from dinocli.engine.schedules import Clock, Constant, Cosine, LinearByEpoch, Rate, Warmup
from dinocli.method.preset import AnyMethod, Preset
from dinocli.method.stages import check_same_network
from dinocli.train.held_out import Labelled
from dinocli.train.origin import Origin
from dinocli.train.state import StageFacts
from dinocli.weights.checkpoint import Weights
from dinocli.weights.feature_teachers import FeatureTeachers
from dinocli.weights.frozen_teacher import FrozenTeacher

# Training images per prototype below which a warning is given. The demo's recipe has 75, the paper's 1,950.
IMAGES_PER_PROTOTYPE = 30
_FEWEST_PROTOTYPES = 64  # smallest number to suggest; with fewer, the features are poor

_LONGER = 4  # largest factor by which to suggest more epochs; beyond it, another recipe is better
_MANY_A_BATCH, _BATCH_OF_TINY = 256, 48
# A step of 64 images at 224 pixels takes about a minute on two cores.
_LARGE_CROP, _FEW_STEPS_ON_CPU = 160, 200

OnCollapse = Literal["stop", "warn"]
Decode = Literal["cpu", "gpu"]


@dataclass(frozen=True)
class Saving:
    """Schedule of a run's checkpoints. The run also saves at its start and end.

    Attributes:
        seconds: Seconds between two checkpoints. If None, saving does not depend on time.
        steps: Steps between two checkpoints. If None, saving does not depend on steps.
        keep: Number of newest checkpoints to keep.
        milestones: Steps between checkpoints that are never deleted. If None, there are none.
    """

    seconds: float | None = 600.0
    steps: int | None = None
    keep: int = 2
    milestones: int | None = None


@dataclass(frozen=True)
class Plan:
    """Settings of a run that is ready to start.

    Attributes:
        name: Name of the preset.
        stop: Number of steps to train, fewer than the schedules' if `--steps` ends the run early.
        out: Run folder.
        workers: Number of processes that decode images.
        init: Source of the initial weights, as the user named it.
        initial: Initial weights, on the CPU. If None, they are read from `init` when needed.
        origin: Finished run that this run continues, if any.
        teacher: Frozen teacher with heads, or encoders whose features teach, if the preset needs one.
        teacher_cache: Folder for the teachers' features of fixed views. If None, each step computes them.
        cache: Cache of decoded images: `ram` or a folder. If None, images are decoded in every epoch.
        decode: `gpu` decodes JPEGs on the CUDA device of the run, `cpu` in the workers.
        accumulate: Number of parts of a batch, computed one after another to save memory.
        saving: Schedule of the checkpoints.
        on_collapse: Action when training collapses.
        monitor: Small labelled set on which to evaluate the student's moving average, if any.
        monitor_every: Steps between two evaluations on the monitor and the report's photos. If None, computed by
            `steps_between_evaluations`.
        keep_best: If True, also keep the weights with the best accuracy on the monitor.
        labels: Labels of the images for fine-tuning: class per image [S], int64; or 1 for each class of an image and
            else 0 [S, K].
        held_out: Labelled images that evaluate a fine-tuning.
        patience: Number of evaluations in a row without a better score after which the run ends. If None, it never
            ends early.
        trackers: Names of the experiment trackers that get the figures and pictures too.
        report: If True, evaluate a few photos during training, and draw the report.
        parallel: `ddp` replicates the model in every process; `fsdp` shards it.
        compiled: If True, compile the transformer blocks and the augmentation.
        recompute: If True, use activation checkpointing for the student's blocks, to save memory.
        graph: True to capture steps as CUDA graphs. If None, they are captured on CUDA in one process, without
            accumulation and activation checkpointing.

    Raises:
        DinoError: If `graph` does not fit the device or other settings, the batch cannot be split evenly over the
            processes and their parts, `teacher` does not match the preset's `teacher.frozen`, its features cannot be
            stored, the run to continue has another network, the images are packed pixels that were decoded by other
            settings, or `images.pair_within` finds no pair of frames.
    """

    name: str
    preset: Preset
    source: Source
    stop: int
    out: Path
    device: torch.device
    workers: int
    init: str | None
    teacher: FrozenTeacher | FeatureTeachers | None = None
    teacher_cache: Path | None = None
    cache: str | None = None
    decode: Decode = "cpu"
    accumulate: int = 1
    saving: Saving = Saving()
    on_collapse: OnCollapse = "warn"
    monitor: str | None = None
    monitor_every: int | None = None
    keep_best: bool = False
    trackers: tuple[str, ...] = ()
    report: bool = False
    parallel: Kind = "ddp"
    compiled: bool = False
    recompute: bool = False
    origin: Origin | None = None
    labels: Tensor | None = None
    held_out: Labelled | None = None
    patience: int | None = None
    initial: Weights | None = field(default=None, compare=False, repr=False)
    graph: bool | None = None

    def __post_init__(self) -> None:
        batch, each = self.preset.training.batch_size, self.images_each
        if isinstance(self.source, PackedImages):
            self.source.pixels.check(self.preset.images)
        if self.preset.images.pair_within:
            clips_of(self.source, self.preset.images.pair_within)  # refuses images without pairs
        if self.preset.teacher.frozen != (self.teacher is not None):
            raise DinoError(
                "teacher.frozen is true, and --teacher is not set"
                if self.preset.teacher.frozen
                else "--teacher is set, and teacher.frozen is false",
                f"--teacher {'timm:NAME' if self.preset.losses.features else 'RUN'}"
                if self.preset.teacher.frozen
                else "--set teacher.frozen=true",
            )
        if self.origin:
            check_same_network(self.preset, self.origin.preset, self.origin.source)
        if self.teacher_cache:
            self._check_teacher_cache()
        if self.decode == "gpu":
            self._check_decode()
        if self.graph:
            self._check_graph()
        trained = self.preset.backbone.learning.trained
        if trained.kind == "lora" and self.parallel == "fsdp":
            raise DinoError(
                "--parallel fsdp does not shard LoRA's additions, and its memory is small without sharding",
                "--parallel ddp",
            )
        if batch % size():
            raise DinoError(
                f"a batch of {batch} images cannot be split evenly over {size()} processes",
                f"--batch-size {max(1, round(batch / size())) * size()}",
            )
        if each % self.accumulate:
            near = max(n for n in equal_parts(each) if n <= self.accumulate)
            raise DinoError(
                f"--accumulate {self.accumulate} does not split a batch of {each} images into equal parts",
                f"--accumulate {near}",
            )

    def _check_graph(self) -> None:
        if self.device.type != "cuda":
            raise DinoError(f"--graph needs a CUDA device; this run trains on {self.device}", "remove --graph")
        if size() > 1:
            raise DinoError(f"--graph trains in one process; this run has {size()}", "remove --graph")
        if self.accumulate > 1:  # parts differ in their number of masked patches from step to step
            raise DinoError(
                f"--graph captures whole batches; --accumulate is {self.accumulate}", "use only one of them"
            )
        if self.recompute:  # it reads torch's random state in each step, which a capture cannot
            raise DinoError(
                "--graph cannot capture activation checkpointing", "use only one of --graph and --recompute"
            )

    @property
    def captures(self) -> bool:
        """True if steps are captured as CUDA graphs."""
        if self.graph is None:
            return self.device.type == "cuda" and size() == 1 and self.accumulate == 1 and not self.recompute
        return self.graph

    @property
    def images_each(self) -> int:
        """Number of images per step in each process."""
        return self.preset.training.batch_size // size()

    @property
    def precision(self) -> TrainingPrecision:
        """Precision of matrix products on the run's device."""
        return training_precision(self.device, self.preset.training.precision)

    @property
    def clock(self) -> Clock:
        """Clock at the start of the run."""
        return start_clock(self.preset, self.source.count)

    @property
    def phases(self) -> list[tuple[int, Plan]]:
        """Phases of the run by crop size: the number of steps, and the plan with only these crops.

        They are in order. A run that stops before its crops grow has a single phase. If sizes are drawn for each step,
        the phases go from the smallest to the largest, with the expected number of steps.
        """
        if mixes := self.preset.views.mixes:
            sized = [(share, self.preset.model_copy(update={"views": those})) for share, those in mixes]
            by_size = sorted(sized, key=lambda each: _pixels(each[1]))
            return [(round(share * self.stop), replace(self, preset=preset)) for share, preset in by_size]
        views = self.preset.views.phases(self.clock.steps_per_epoch)
        ends = [min(first, self.stop) for first, _ in views[1:]] + [self.stop]
        parts = []
        for (first, those), end in zip(views, ends, strict=True):
            if first < end or first == 0:
                preset = self.preset.model_copy(update={"views": those})
                parts.append((end - first, replace(self, preset=preset)))
        return parts

    def _check_decode(self) -> None:
        if self.device.type != "cuda":
            raise DinoError(
                f"--decode gpu needs a CUDA device; the device of this run is {self.device}", "run without --decode gpu"
            )
        if self.cache:
            raise DinoError(
                "--decode gpu decodes images in every epoch; --cache keeps decoded images", "keep one of the two"
            )
        if isinstance(self.source, Shards):
            raise DinoError(
                "--decode gpu needs random access to images; shards are read as a stream", "run without --decode gpu"
            )

    def _check_teacher_cache(self) -> None:
        option = f"--cache-teacher {self.teacher_cache}"
        if not isinstance(self.teacher, FeatureTeachers):
            raise DinoError(
                f"{option} stores the features of teachers without heads; losses.features is not set",
                "--preset distill-features --teacher timm:NAME, or remove --cache-teacher",
            )
        if isinstance(self.source, Shards):
            raise DinoError(f"{option} needs random access to images; shards are read as a stream", "remove it")
        if not self.preset.views.fixed:
            raise DinoError(
                f"{option} needs fixed views, and every epoch draws new ones",
                "--set views.fixed=4 for four views of each image, which later epochs repeat",
            )

    @property
    def loaded_views(self) -> ViewsConfig:
        """Views to cut from images: those of the preset, larger if teachers see a larger size."""
        views = self.preset.views
        return self.teacher.views(self.preset) if isinstance(self.teacher, FeatureTeachers) else views

    def method(self) -> AnyMethod:
        """Build the training method with fresh weights.

        Raises:
            DinoError: If the backbone does not support the options, or the frozen teacher cannot teach it.
        """
        method: AnyMethod
        if isinstance(self.teacher, FeatureTeachers):
            method = self.teacher.method(self.preset)
        elif self.labels is not None:
            method = self.preset.label_method(self.labels)
        else:
            method = self.preset.method(self.teacher.network(self.preset) if self.teacher else None)
        if self.recompute:
            method.student.backbone.recompute_blocks()
        return method

    @property
    def stages(self) -> tuple[StageFacts, ...]:
        """Earlier stages that the run continues, oldest first."""
        return self.origin.stages if self.origin else ()

    @property
    def lr(self) -> Rate:
        """Learning rate over the run, scaled for the batch size."""
        return self.preset.optimizer.lr_for(self.preset.training.batch_size)


def cautions(plan: Plan) -> Iterator[str]:
    """Yield a warning for each setting that is probably a mistake, with a suggested value."""
    preset, clock = plan.preset, plan.clock
    yield from _note_unpaired(plan)
    if plan.stop == clock.total and (line := _long_schedules(plan)):
        yield line
    if plan.device.type == "cpu" and preset.views.global_1.size >= _LARGE_CROP and plan.stop > _FEW_STEPS_ON_CPU:
        shorter = f"--preset tiny takes minutes, and dino doctor {plan.source.where} suggests settings"
        shorter = "--epochs and --batch-size shorten it" if plan.keep_best else shorter
        yield (
            f"{plan.stop} steps of {preset.training.batch_size} images at {preset.views.global_1.size} pixels may take "
            f"days on a CPU: {shorter}"
        )
    seen = clock.total * preset.training.batch_size
    for name, head in preset.heads.items() if plan.origin is None else ():  # a stage's prototypes are trained already
        if head.prototypes and seen < IMAGES_PER_PROTOTYPE * head.prototypes:
            fits = power_below(max(1, seen // IMAGES_PER_PROTOTYPE))
            epochs = math.ceil(clock.epochs * IMAGES_PER_PROTOTYPE * head.prototypes / seen)
            ways = [f"--set heads.{name}.prototypes={fits}"] if fits >= _FEWEST_PROTOTYPES else []
            if epochs <= _LONGER * clock.epochs:
                ways.append(f"--epochs {epochs}")
            else:
                ways.append(f"settings that dino doctor {plan.source.where} suggests")
            yield (
                f"{clock.total} steps show {seen} images to {head.prototypes} prototypes, too few to train most: "
                + ", or ".join(ways)
            )
    if plan.accumulate > 1 and (remedy := _avoid_batch_norm(preset, fixed=plan.init is not None)):
        at_once = preset.training.batch_size // plan.accumulate
        yield (
            f"with --accumulate {plan.accumulate} BatchNorm normalizes over {at_once} images instead of the whole "
            f"batch: {remedy}"
        )
    if preset.losses.koleo and plan.images_each // plan.accumulate == 1:
        yield (
            "losses.koleo has no effect: each process and part has one image, without a neighbour: a smaller "
            f"--accumulate, --batch-size {2 * preset.training.batch_size}, or --set losses.koleo=none"
        )
    usual, peak = 0.0005 * preset.training.batch_size / 256, max(plan.lr.bounds)
    key = "value" if isinstance(preset.optimizer.lr, (Constant, Warmup)) else "start"
    # Low-rank additions and the last blocks alone learn at higher rates than all weights do.
    whole = preset.backbone.learning.trained.kind == "all"
    if preset.optimizer.kind == "adamw" and plan.origin is None and whole and not usual / 10 <= peak <= usual * 10:
        yield (
            f"a learning rate of {peak:.2g} for {preset.training.batch_size} images is far from the paper's "
            f"0.0005 * batch / 256 = {usual:.2g}: --set optimizer.lr.{key}=0.0005"
        )


def _note_unpaired(plan: Plan) -> Iterator[str]:
    within = plan.preset.images.pair_within
    if within and (alone := clips_of(plan.source, within).alone):
        yield (
            f"{alone} of {plan.source.count} images {'have' if alone > 1 else 'has'} no other frame within {within:g} "
            "seconds; both views are cut from one frame"
        )


def _avoid_batch_norm(preset: Preset, *, fixed: bool) -> str:
    """Return how to train with accumulation and without BatchNorm in parts; empty if the networks have none.

    Args:
        preset: Recipe.
        fixed: True if loaded weights fix the backbone.
    """
    without = [f"--set heads.{name}.batch_norm=false" for name, head in preset.heads.items() if head.batch_norm]
    if preset.backbone.stem == "conv" and not fixed:
        without.append("--set backbone.stem=patch")
    else:
        with torch.device("meta"):
            modules = preset.backbone.build(drop_path=False).modules()
        if any(isinstance(module, _BatchNorm) for module in modules):
            return "--accumulate 1 with a smaller --batch-size"
    return f"--accumulate 1, or {' '.join(without)}" if without else ""


def short_stop(plan: Plan) -> str:
    """Return a note on a run that stops before its schedules end, with its unfinished warm-ups; empty otherwise."""
    clock = plan.clock
    if plan.stop >= clock.total:
        return ""
    line = f"stops at step {plan.stop} of {clock.total}; schedules still span the whole run"
    within = [warm_up for warm_up in _warm_ups(plan.preset) if warm_up[1] * clock.steps_per_epoch >= plan.stop > 0]
    if not within:
        return line
    names = _join([f"{name} ({epochs * clock.steps_per_epoch} steps)" for name, epochs, _ in within])
    return f"{line}, and it ends within {names}: remove with " + " ".join(f"--set {way}" for *_, way in within)


def _long_schedules(plan: Plan) -> str:
    clock = plan.clock
    long = [(name, n, path) for name, n, path in _warm_ups(plan.preset, low=False) if n > clock.epochs / 2]
    if not long:
        return ""
    names = _join([f"{name} ({epochs * clock.steps_per_epoch})" for name, epochs, _ in long])
    fits = max(1, clock.epochs // 5)
    ways = " ".join(f"--set {path.removesuffix('=0')}={fits}" for *_, path in long)
    return f"more than half of the {clock.total} steps go to {names}: shorten with {ways}"


def _join(names: list[str]) -> str:
    names = list(dict.fromkeys(names))  # two heads or losses may have the same warm-up
    return " and ".join([*([", ".join(names[:-1])] if names[1:] else []), *names[-1:]])


def _warm_ups(preset: Preset, *, low: bool = True) -> Iterator[tuple[str, int, str]]:
    """Yield the name of each warm-up and freeze, its length in epochs, and the setting that removes it.

    If `low`, include the epochs of low resolution.
    """
    if isinstance(preset.optimizer.lr, (Cosine, Warmup)):
        yield "the learning rate's warm-up", preset.optimizer.lr.warmup_epochs, "optimizer.lr.warmup_epochs=0"
    yield "the freeze of the backbone", preset.backbone.learning.frozen_epochs, "backbone.learning.frozen_epochs=0"
    for name, head in preset.heads.items():
        yield "the freeze of the prototypes", head.freeze_last_layer_epochs, f"heads.{name}.freeze_last_layer_epochs=0"
    for name, loss in preset.losses.with_targets().items():
        ramp = loss.targets.temperature
        if isinstance(ramp, LinearByEpoch):
            yield "the teacher temperature's warm-up", ramp.epochs, f"losses.{name}.targets.temperature.epochs=0"
    if low and preset.views.low_resolution:
        yield "the epochs of low resolution", preset.views.low_resolution.epochs, "views.low_resolution=none"


def check_schedules(preset: Preset) -> None:
    """Check that warm-ups, ramps and freezes fit the length of a run.

    Raises:
        DinoError: If some do not fit. The error names all of them, with values that fit.
    """
    epochs = preset.training.epochs
    faults = [(f"{key}.{fault.key}", *fault[1:]) for key, s in preset.schedules.items() if (fault := s.misfit(epochs))]
    if (frozen := preset.backbone.learning.frozen_epochs) >= epochs and frozen:
        faults.append(("backbone.learning.frozen_epochs", frozen, epochs - 1, 0))
    for name, head in preset.heads.items():
        if head.freeze_last_layer_epochs >= epochs and head.freeze_last_layer_epochs:
            faults.append((f"heads.{name}.freeze_last_layer_epochs", head.freeze_last_layer_epochs, epochs - 1, 0))
    if preset.losses.gram and preset.losses.gram.first_update >= epochs:
        faults.append(("losses.gram.first_update", preset.losses.gram.first_update, epochs - 1, 0))
    if not faults:
        return
    came = _join([f"{key}={value} (at most {most})" for key, value, most, _ in faults])
    fits = " ".join(f"--set {key}={value}" for key, *_, value in faults)
    enough = max(value + (epochs - most) for _, value, most, _ in faults)
    raise DinoError(
        f"{came} {'do' if len(faults) > 1 else 'does'} not fit a run of {epochs} epoch{'s' * (epochs > 1)}",
        f"use {fits}, or --epochs {enough}",
    )


def start_clock(preset: Preset, images: int | None) -> Clock:
    """Return the clock at the start of a run over `images` images. If None, their number is unknown.

    Raises:
        DinoError: If the schedules do not fit the run's length, if there are fewer images than one batch, or if their
            number is unknown and `training.steps_per_epoch` is not set.
    """
    check_schedules(preset)
    batch, steps = preset.training.batch_size, preset.training.steps_per_epoch
    if images is None:
        if steps is None:
            raise DinoError(
                "the number of images from a pipe is unknown, and training.steps_per_epoch is not set",
                "--set training.steps_per_epoch=N, with N = images / batch size",
            )
        return Clock(steps, preset.training.epochs)
    if images < batch:
        few = f"--batch-size {power_below(images)}"
        # A recipe with a batch this large is for a cluster and a million images; a smaller batch alone is not enough.
        if batch >= _MANY_A_BATCH and images >= _BATCH_OF_TINY:
            few = f"use --preset tiny, or {few}; dino doctor IMAGES suggests settings for your images"
        raise DinoError(f"a batch of {batch} images is larger than the set of {images}", few)
    return Clock(steps or images // batch, preset.training.epochs)


def equal_parts(batch: int) -> list[int]:
    """Return the divisors of a batch size in ascending order: the numbers of equal parts it can be split into."""
    return [n for n in range(1, batch + 1) if batch % n == 0]


def _pixels(preset: Preset) -> int:
    return sum(view.size**2 for view in preset.views.all)


def power_below(n: int) -> int:
    """Return the largest power of two that is at most `n`, which is positive."""
    return 1 << (n.bit_length() - 1)


def peak_lr(plan: Plan) -> float:
    """Return the highest learning rate of the run, sampled at a thousand points of its schedule."""
    clock = plan.clock
    return max(plan.lr.at(replace(clock, step=clock.total * i // 1000)) for i in range(1000))
