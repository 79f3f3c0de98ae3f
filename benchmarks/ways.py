"""Methods of a training step to compare, and their input; each is one row of the table."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from original import OriginalStep

from dinocli.core.device import default_workers, keep_freed_memory
from dinocli.data.loader.batch import Batch
from dinocli.data.loader.train import TrainBatches
from dinocli.data.sources.open import open_source
from dinocli.engine.method import Method
from dinocli.engine.schedules import Clock
from dinocli.engine.trainer import Trainer
from dinocli.method.preset import Preset, load_preset

Precision = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class Way:
    """Method of a training step."""

    name: str
    original: bool = False
    precision: Precision = "bfloat16"
    compiled: bool = False
    recomputed: bool = False


WAYS = {
    "original": Way("the original, float32", original=True, precision="float32"),
    "original-bf16": Way("the original, autocast to bfloat16", original=True),
    "float32": Way("this, float32", precision="float32"),
    "bfloat16": Way("this, bfloat16"),
    "compiled": Way("this, bfloat16, compiled", compiled=True),
    "recomputed": Way("this, bfloat16, recomputed", recomputed=True),
}


@dataclasses.dataclass(frozen=True)
class Job:
    """Settings of all methods; see the options of the command."""

    preset: str
    changes: tuple[str, ...]
    batch_size: int
    device: str
    threads: int
    images: str | None
    steps: int

    def read(self, *more: str) -> Preset:
        """Return the preset with this job's batch size and further changes."""
        return load_preset(self.preset, [*self.changes, f"training.batch_size={self.batch_size}", *more])

    @property
    def processor_time(self) -> bool:
        """True if processor time is measured instead of wall time."""
        return self.device == "cpu" and self.threads == 1 and self.images is None

    @property
    def now(self) -> Callable[[], float]:
        """Function that returns the time to measure, in seconds."""
        return time.process_time if self.processor_time else time.perf_counter


def middle(preset: Preset) -> Clock:
    """Return the middle of a run, when nothing is frozen and the learning rate is not zero."""
    return Clock(1000, preset.training.epochs, step=500 * preset.training.epochs)


def build(way: Way, preset: Preset, device: torch.device, kind: type[Trainer] = Trainer) -> Trainer | OriginalStep:
    """Build a method's trainer; all methods have the same initial weights."""
    torch.manual_seed(0)
    method = preset.method()
    low = way.precision == "bfloat16"
    cached = kind is Trainer  # torch asks for casts without a cache in CUDA graphs
    precision = torch.autocast(device.type, torch.bfloat16, cache_enabled=cached) if low else contextlib.nullcontext()
    if way.original:
        return OriginalStep(preset, method.student.weights(), middle(preset), device, precision)
    if device.type == "cpu":
        keep_freed_memory()  # as `dino pretrain` does on a CPU
    if way.recomputed:
        method.student.backbone.recompute_blocks()
    for network in (method.student, method.teacher) if way.compiled else ():
        network.compile_blocks()
    return trainer_of(preset, method.to(device), precision, kind)


def trainer_of(
    preset: Preset,
    method: Method,
    precision: contextlib.AbstractContextManager[Any] | None,
    kind: type[Trainer] = Trainer,
) -> Trainer:
    """Return a trainer in the middle of a run."""
    return kind(
        method,
        preset.optimizer,
        middle(preset),
        batch_size=preset.training.batch_size,
        precision=precision,
        seed=0,
        guarded=True,
    )


def made_up(preset: Preset, device: torch.device, seed: int = 0, dtype: torch.dtype = torch.float32) -> Batch:
    """Return a batch of noise, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    views, images = preset.views, preset.training.batch_size

    def crops(count: int, size: int) -> torch.Tensor:
        return torch.randn(count, images, 3, size, size, generator=generator).to(device, dtype)

    local = crops(views.locals, views.local.size) if views.local and views.locals else None
    return Batch(crops(len(views.globals), views.global_1.size), local, torch.arange(images))


def batches(way: Way, job: Job, preset: Preset, device: torch.device) -> Iterator[Batch]:
    if job.images is None:
        return itertools.cycle([made_up(preset, device, seed) for seed in (0, 1)])
    return iter(
        TrainBatches(
            open_source(job.images),
            preset.views,
            batch_size=job.batch_size,
            seed=0,
            images=preset.images,
            workers=default_workers(device),
            device=device,
            compiled=way.compiled,
        )
    )


def loss_of(stepped: Any) -> float:
    return stepped if isinstance(stepped, float) else stepped["loss"].item()


def first_losses(way: Way, job: Job) -> list[float]:
    """Return the losses of two steps on two images, without randomness and compilation."""
    # The learning rate is not scaled to the small batch, so that the first step changes the second loss visibly.
    preset = job.read("training.batch_size=2", "backbone.drop_path=0", "optimizer.lr_rule=none")
    device = torch.device(job.device)
    small = build(dataclasses.replace(way, compiled=False), preset, device)
    return [loss_of(small.step(made_up(preset, device, seed))) for seed in (0, 1)]
