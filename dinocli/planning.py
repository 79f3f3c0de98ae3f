"""Plan: what a run will do, worked out before it does anything."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from dinocli.data.sources import Source
from dinocli.distillation import SelfDistillation
from dinocli.distributed import size
from dinocli.engine.parallel import Kind
from dinocli.errors import DinoError
from dinocli.frozen_teacher import FrozenTeacher
from dinocli.preset import Preset
from dinocli.schedules import Clock, Constant, Cosine, LinearByEpoch, Rate

# The demo's recipe shows each prototype 75 images, the paper's 1,950.
_IMAGES_A_PROTOTYPE = 30
_FEWEST_PROTOTYPES = 64  # that are worth naming: of fewer hardly anything is learned

_LONGER = 4  # times the epochs that are worth naming; more is another recipe
_MANY_A_BATCH, _BATCH_OF_TINY = 256, 48
# A step of 64 images at 224 pixels takes a minute or so on two cores.
_LARGE_CROP, _FEW_STEPS_ON_CPU = 160, 200

OnCollapse = Literal["stop", "warn"]


@dataclass(frozen=True)
class Saving:
    """How often a run's state is saved, besides at its end.

    Attributes:
        seconds: Between two; absent, time does not count.
        steps: Between two; absent, they do not count.
        keep: How many of the newest are kept.
        milestones: Steps between states that stay for good; absent, there are none.
    """

    seconds: float | None = 600.0
    steps: int | None = None
    keep: int = 2
    milestones: int | None = None


@dataclass(frozen=True)
class Plan:
    """A run, ready to start.

    Attributes:
        name: Of the preset.
        preset: What to train.
        source: The images.
        stop: Steps to do; fewer than the schedules' where the user asked for it.
        out: The run folder.
        device: Where to train.
        workers: Processes that decode.
        init: Weights to start from, as the user named them.
        teacher: The frozen one, where the preset wants that.
        cache: Where decoded images are kept, if they are: `ram`, or a folder.
        accumulate: Parts in which a batch is taken, to need less memory.
        saving: How often all that is needed to go on is saved.
        on_collapse: What to do where the networks collapse.
        monitor: A small labelled set to measure the teacher on, if there is one.
        monitor_every: Steps between two looks at it, and at the report's photos; absent, so many that they take a
            twentieth of the time at most.
        tensorboard: Whether to write what is logged for TensorBoard too.
        report: Whether to look at the same photos now and again, and to draw the report.
        parallel: How several processes share the work.
        compiled: Whether torch compiles what can be compiled.
        recompute: Whether the student's blocks are worked out again for the gradient, to need less memory.

    Raises:
        DinoError: A batch cannot be shared evenly by the processes and their parts, or a frozen teacher is missing.
    """

    name: str
    preset: Preset
    source: Source
    stop: int
    out: Path
    device: torch.device
    workers: int
    init: str | None
    teacher: FrozenTeacher | None = None
    cache: str | None = None
    accumulate: int = 1
    saving: Saving = Saving()
    on_collapse: OnCollapse = "warn"
    monitor: str | None = None
    monitor_every: int | None = None
    tensorboard: bool = False
    report: bool = False
    parallel: Kind = "ddp"
    compiled: bool = False
    recompute: bool = False

    def __post_init__(self) -> None:
        batch, each = self.preset.training.batch_size, self.images_each
        if self.preset.teacher.frozen != (self.teacher is not None):
            raise DinoError(
                "the preset says teacher.frozen, and no teacher was named"
                if self.preset.teacher.frozen
                else "the preset's teacher follows the student, and another one was named",
                "--teacher RUN" if self.preset.teacher.frozen else "--set teacher.frozen=true",
            )
        if batch % size():
            raise DinoError(
                f"a batch of {batch} images cannot be shared evenly by {size()} processes",
                f"--batch-size {max(1, round(batch / size())) * size()}",
            )
        if each % self.accumulate:
            near = max(n for n in equal_parts(each) if n <= self.accumulate)
            raise DinoError(
                f"a batch of {each} images in parts of the same size was wanted; {self.accumulate} do not divide it",
                f"--accumulate {near}",
            )

    @property
    def images_each(self) -> int:
        """Images of a batch that each process takes."""
        return self.preset.training.batch_size // size()

    @property
    def clock(self) -> Clock:
        """The clock at the start."""
        return start_clock(self.preset, self.source.count)

    @property
    def phases(self) -> list[tuple[int, Plan]]:
        """The steps of the run that have crops of one size, and the plan with those alone: smaller ones, then larger.

        A run that stops before its crops grow has no second part.
        """
        views = self.preset.views.phases(self.clock.steps_per_epoch)
        ends = [min(first, self.stop) for first, _ in views[1:]] + [self.stop]
        parts = []
        for (first, those), end in zip(views, ends, strict=True):
            if first < end or first == 0:
                preset = self.preset.model_copy(update={"views": those})
                parts.append((end - first, replace(self, preset=preset)))
        return parts

    def method(self) -> SelfDistillation:
        """What the run trains, with fresh weights.

        Raises:
            DinoError: Its backbone cannot be run as was asked for, or the frozen teacher cannot teach it.
        """
        method = self.preset.method(self.teacher.network(self.preset) if self.teacher else None)
        if self.recompute:
            method.student.backbone.recompute_blocks()
        return method

    @property
    def lr(self) -> Rate:
        """The learning rate over the run, with the batch size counted in."""
        return self.preset.optimizer.lr_for(self.preset.training.batch_size)


def cautions(plan: Plan) -> Iterator[str]:
    """What in a plan is unlikely to be meant: a line each, with the value to take."""
    preset, clock = plan.preset, plan.clock
    if plan.stop == clock.total and (line := _long_schedules(plan)):
        yield line
    if plan.device.type == "cpu" and preset.views.global_1.size >= _LARGE_CROP and plan.stop > _FEW_STEPS_ON_CPU:
        yield (
            f"{plan.stop} steps of {preset.training.batch_size} images at {preset.views.global_1.size} pixels take days"
            f" on a CPU: --preset tiny takes minutes, and dino doctor {plan.source.where} suggests settings"
        )
    seen = clock.total * preset.training.batch_size
    for name, head in preset.heads.items():
        if seen < _IMAGES_A_PROTOTYPE * head.prototypes:
            fits = _power_below(max(1, seen // _IMAGES_A_PROTOTYPE))
            epochs = math.ceil(clock.epochs * _IMAGES_A_PROTOTYPE * head.prototypes / seen)
            ways = [f"--set heads.{name}.prototypes={fits}"] if fits >= _FEWEST_PROTOTYPES else []
            if epochs <= _LONGER * clock.epochs:
                ways.append(f"--epochs {epochs}")
            else:
                ways.append(f"settings that dino doctor {plan.source.where} suggests")
            yield (
                f"{clock.total} steps show {seen} images to {head.prototypes} prototypes, and few will learn: "
                + ", or ".join(ways)
            )
    if plan.accumulate > 1 and any(head.batch_norm for head in preset.heads.values()):
        at_once = preset.training.batch_size // plan.accumulate
        without = ", ".join(f"--set heads.{name}.batch_norm=false" for name, h in preset.heads.items() if h.batch_norm)
        yield (
            f"in {plan.accumulate} parts the BatchNorm of a head sees {at_once} images at a time, and learns otherwise "
            f"than from the whole batch: --accumulate 1, or {without}"
        )
    usual, peak = 0.0005 * preset.training.batch_size / 256, max(plan.lr.bounds)
    key = "value" if isinstance(preset.optimizer.lr, Constant) else "start"
    if preset.optimizer.kind == "adamw" and not usual / 10 <= peak <= usual * 10:
        yield (
            f"a learning rate of {peak:.2g} for {preset.training.batch_size} images is far from the paper's "
            f"0.0005 * batch / 256 = {usual:.2g}: --set optimizer.lr.{key}=0.0005"
        )


def short_stop(plan: Plan) -> str:
    """Return a line about a run that stops before its schedules end, with those that it does not get past; else ""."""
    clock = plan.clock
    if plan.stop >= clock.total:
        return ""
    line = f"stops at step {plan.stop} of {clock.total}; the schedules stay those of the whole run"
    within = [warm_up for warm_up in _warm_ups(plan.preset) if warm_up[1] * clock.steps_per_epoch >= plan.stop > 0]
    if not within:
        return line
    names = _listed([f"{name} ({epochs * clock.steps_per_epoch} steps)" for name, epochs, _ in within])
    return f"{line}, and it ends within {names}: without them " + " ".join(f"--set {way}" for *_, way in within)


def _long_schedules(plan: Plan) -> str:
    clock = plan.clock
    long = [(name, n, path) for name, n, path in _warm_ups(plan.preset, low=False) if n > clock.epochs / 2]
    if not long:
        return ""
    names = _listed([f"{name} ({epochs * clock.steps_per_epoch})" for name, epochs, _ in long])
    fits = max(1, clock.epochs // 5)
    ways = " ".join(f"--set {path.removesuffix('=0')}={fits}" for *_, path in long)
    return f"more than half of the {clock.total} steps go to {names}: {ways} leaves most of the run after that"


def _listed(names: list[str]) -> str:
    return " and ".join([*([", ".join(names[:-1])] if names[1:] else []), *names[-1:]])


def _warm_ups(preset: Preset, *, low: bool = True) -> Iterator[tuple[str, int, str]]:
    """Yield each warm-up and freeze: its name, its length in epochs, and the setting without it.

    Args:
        preset: Recipe to look through.
        low: Include the epochs of low resolution.
    """
    if isinstance(preset.optimizer.lr, Cosine):
        yield "the learning rate's warm-up", preset.optimizer.lr.warmup_epochs, "optimizer.lr.warmup_epochs=0"
    for name, head in preset.heads.items():
        yield "the freeze of the prototypes", head.freeze_last_layer_epochs, f"heads.{name}.freeze_last_layer_epochs=0"
    for name, loss in preset.losses.aimed().items():
        ramp = loss.targets.temperature
        if isinstance(ramp, LinearByEpoch):
            yield "the teacher temperature's warm-up", ramp.epochs, f"losses.{name}.targets.temperature.epochs=0"
    if low and preset.views.low_resolution:
        yield "the epochs of low resolution", preset.views.low_resolution.epochs, "views.low_resolution=none"


def check_schedules(preset: Preset) -> None:
    """Check that warm-ups, ramps and freezes fit the length of a run.

    Raises:
        DinoError: Some do not; it names all of them with values that fit.
    """
    epochs = preset.training.epochs
    faults = [(f"{key}.{fault.key}", *fault[1:]) for key, s in preset.schedules.items() if (fault := s.misfit(epochs))]
    for name, head in preset.heads.items():
        if head.freeze_last_layer_epochs >= epochs and head.freeze_last_layer_epochs:
            faults.append((f"heads.{name}.freeze_last_layer_epochs", head.freeze_last_layer_epochs, epochs - 1, 0))
    if not faults:
        return
    came = _listed([f"{key}={value} (at most {most})" for key, value, most, _ in faults])
    fits = " ".join(f"--set {key}={value}" for key, *_, value in faults)
    enough = max(value + (epochs - most) for _, value, most, _ in faults)
    raise DinoError(
        f"{came} {'do' if len(faults) > 1 else 'does'} not fit a run of {epochs} epoch{'s' * (epochs > 1)}",
        f"use {fits}, or --epochs {enough}",
    )


def start_clock(preset: Preset, images: int | None) -> Clock:
    """The clock of a run over `images` images; absent where nobody knows how many a stream has.

    Raises:
        DinoError: The schedules do not fit the run's length; there are fewer images than one batch, or an unknown
            number in a recipe that needs to know.
    """
    check_schedules(preset)
    batch, steps = preset.training.batch_size, preset.training.steps_per_epoch
    if images is None:
        if steps is None:
            raise DinoError(
                "nobody knows how many images come through a pipe, and so not how long an epoch is",
                "--set training.steps_per_epoch=N, which is images / batch",
            )
        return Clock(steps, preset.training.epochs)
    if images < batch:
        few = f"--batch-size {_power_below(images)}"
        # Such a batch is of a recipe for a cluster and a million images, which a smaller one alone does not mend.
        if batch >= _MANY_A_BATCH and images >= _BATCH_OF_TINY:
            few = f"use --preset tiny, or {few}; dino doctor IMAGES suggests settings for your images"
        raise DinoError(f"a batch of {batch} images is larger than the set of {images}", few)
    return Clock(steps or images // batch, preset.training.epochs)


def equal_parts(batch: int) -> list[int]:
    """The numbers of parts of the same size in which a batch can be taken, the fewest first."""
    return [n for n in range(1, batch + 1) if batch % n == 0]


def _power_below(n: int) -> int:
    return 1 << (n.bit_length() - 1)
