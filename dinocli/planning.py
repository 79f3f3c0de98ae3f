"""Plan: what a run will do, worked out before it does anything."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

from dinocli.data.crops import ViewsConfig
from dinocli.data.loader import Batch
from dinocli.data.sources import Source
from dinocli.distributed import size
from dinocli.engine.parallel import Kind
from dinocli.errors import DinoError
from dinocli.preset import Preset
from dinocli.schedules import Clock, Constant, Cosine, LinearByEpoch, Rate

# Share of a bare matrix product's rate that a whole step reaches: measured 0.8 on a CPU; published ViT runs and DINO's
# own logs say 0.25 to 0.4 on a GPU.
_EFFICIENCY = {"cpu": 0.7, "cuda": 0.3, "mps": 0.3}


# The demo's recipe shows each prototype 75 images, the paper's 1,950.
_IMAGES_A_PROTOTYPE = 30
_FEWEST_PROTOTYPES = 64  # that are worth naming: of fewer hardly anything is learned

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

    Raises:
        DinoError: A batch cannot be shared evenly by the processes and their parts.
    """

    name: str
    preset: Preset
    source: Source
    stop: int
    out: Path
    device: torch.device
    workers: int
    init: str | None
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

    def __post_init__(self) -> None:
        batch, each = self.preset.training.batch_size, self.images_each
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
    def lr(self) -> Rate:
        """The learning rate over the run, with the batch size counted in."""
        return self.preset.optimizer.lr_for(self.preset.training.batch_size)


@dataclass(frozen=True)
class Estimate:
    """What a run will take.

    Attributes:
        parameters: Of the student: backbone and heads.
        backbone_parameters: Of the backbone alone.
        flops: Floating-point operations an image, student and teacher, forward and backward.
        memory: Bytes at the peak of a step, in each process.
        seconds: Of the whole run.
    """

    parameters: int
    backbone_parameters: int
    flops: float
    memory: float
    seconds: float


def cautions(plan: Plan) -> Iterator[str]:
    """What in a plan is unlikely to be meant: a line each, with the value to take."""
    preset, clock = plan.preset, plan.clock
    for name, schedule, path in _warm_ups(preset):
        steps = schedule * clock.steps_per_epoch
        if steps >= plan.stop > 0:
            yield f"{name} takes {steps} steps and this run ends at {plan.stop}: --set {path}=0"
        elif steps > clock.total / 2:
            fits = max(1, clock.epochs // 5)
            yield f"{name} takes {steps} of {clock.total} steps: --set {path}={fits} leaves most of the run after it"
    seen = clock.total * preset.training.batch_size
    for name, head in preset.heads.items():
        if seen < _IMAGES_A_PROTOTYPE * head.prototypes:
            fits = _power_below(max(1, seen // _IMAGES_A_PROTOTYPE))
            epochs = math.ceil(clock.epochs * _IMAGES_A_PROTOTYPE * head.prototypes / seen)
            fewer = f"--set heads.{name}.prototypes={fits}, or " if fits >= _FEWEST_PROTOTYPES else ""
            yield (
                f"{clock.total} steps show {seen} images to {head.prototypes} prototypes, and few will learn: "
                f"{fewer}--epochs {epochs}"
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


def _warm_ups(preset: Preset) -> Iterator[tuple[str, int, str]]:
    """What each warm-up and freeze is called, its length in epochs, and its key."""
    if isinstance(preset.optimizer.lr, Cosine):
        yield "the learning rate's warm-up", preset.optimizer.lr.warmup_epochs, "optimizer.lr.warmup_epochs"
    for name, head in preset.heads.items():
        yield "the freeze of the prototypes", head.freeze_last_layer_epochs, f"heads.{name}.freeze_last_layer_epochs"
    for name, loss in preset.losses.present().items():
        temperature = loss.targets.temperature
        if isinstance(temperature, LinearByEpoch):
            yield "the teacher temperature's warm-up", temperature.epochs, f"losses.{name}.targets.temperature.epochs"


def start_clock(preset: Preset, images: int | None) -> Clock:
    """The clock of a run over `images` images; absent where nobody knows how many a stream has.

    Raises:
        DinoError: There are fewer images than one batch, or an unknown number in a recipe that needs to know.
    """
    batch, steps = preset.training.batch_size, preset.training.steps_per_epoch
    if images is None:
        if steps is None:
            raise DinoError(
                "nobody knows how many images come through a pipe, and so not how long an epoch is",
                "--set training.steps_per_epoch=N, which is images / batch",
            )
        return Clock(steps, preset.training.epochs)
    if images < batch:
        raise DinoError(
            f"a batch of {batch} images was wanted; the folder has {images}", f"--batch-size {_power_below(images)}"
        )
    return Clock(steps or images // batch, preset.training.epochs)


def equal_parts(batch: int) -> list[int]:
    """The numbers of parts of the same size in which a batch can be taken, the fewest first."""
    return [n for n in range(1, batch + 1) if batch % n == 0]


def _power_below(n: int) -> int:
    return 1 << (n.bit_length() - 1)


def estimate(plan: Plan) -> Estimate:
    """Count a step's operations and bytes on tensors without data, and time a matrix product for the device's rate."""
    with torch.device("meta"):
        method = plan.preset.method()
        batch = _empty_batch(plan.preset.views)
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved[id(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
        kept.append(tensor)
        return tensor

    kept: list[torch.Tensor] = []
    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        torch.stack(list(method(*method.parts(batch, 1, plan.clock)).values())).sum().backward()
    flops = counter.get_total_flops() / _EMPTY_BATCH
    weights = _bytes(method.student)
    half = 0.55 if plan.device.type == "cuda" else 1.0
    activations = (sum(saved.values()) - weights) / _EMPTY_BATCH * half
    # Student, its gradient, two moments, teacher; and of the batch as much as is taken at once.
    memory = 5 * weights + max(0.0, activations) * plan.images_each / plan.accumulate
    rate = _product_rate(plan.device) * _EFFICIENCY[plan.device.type]
    seconds = flops * plan.images_each * plan.stop / rate
    return Estimate(_count(method.student), _count(method.student.backbone), flops, memory, seconds)


_EMPTY_BATCH = 2


def _empty_batch(views: ViewsConfig) -> Batch:
    size, rows = views.global_1.size, torch.arange(_EMPTY_BATCH, device="cpu")
    crops = torch.empty(len(views.globals), _EMPTY_BATCH, 3, size, size)
    if not views.local or not views.locals:
        return Batch(crops, None, rows)
    return Batch(crops, torch.empty(views.locals, _EMPTY_BATCH, 3, views.local.size, views.local.size), rows)


def _count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _bytes(module: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _product_rate(device: torch.device) -> float:
    """Operations a second of a matrix product in the precision of training."""
    side = 1024 if device.type == "cpu" else 4096
    kind = torch.bfloat16 if device.type == "cuda" else torch.float32
    a = torch.randn(side, side, device=device, dtype=kind)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        product = a @ a
        product[0, 0].item()  # waits for the device
        best = max(best, 2 * side**3 / (time.perf_counter() - start))
    return best
