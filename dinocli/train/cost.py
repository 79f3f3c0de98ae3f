"""Cost estimates: memory, operations and time of a run, before it starts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dinocli.core.device import autocast
from dinocli.core.errors import DinoError
from dinocli.data.loader.batch import Batch
from dinocli.data.views.masking import PatchMasks, deal, masked_in_all
from dinocli.engine.schedules import Clock
from dinocli.method.classification import Classification
from dinocli.method.feature_distillation import FeatureDistillation
from dinocli.method.preset import AnyMethod
from dinocli.models.trained import train_only
from dinocli.train.plan import Plan, equal_parts

# Throughput of a whole step, as a fraction of that of a single matrix product. Measured on a CPU: 0.75 in float32, and
# 0.22 in bfloat16, where the products are much faster than the operations between them. On a GPU, published ViT runs
# and DINO's own logs give 0.25 to 0.4.
_EFFICIENCY = {"cpu": 0.7, "cuda": 0.3, "mps": 0.3}
_COARSE_ON_CPU = 0.22
_FILLED = 0.9  # fraction of the free memory for a step; the rest is for the device itself and for fragmentation
_BUSY = 16  # images at once; with fewer, a device is not busy


@dataclass(frozen=True)
class Estimate:
    """Estimated cost of a run.

    Attributes:
        parameters: Number of parameters of the student: backbone and heads.
        backbone_parameters: Number of parameters of the backbone alone.
        flops: Floating-point operations per image: student and teacher, forward and backward. If the crops change
            size, the average over the run.
        fixed: Bytes that do not depend on the batch, such as weights, gradients and moments.
        waiting: Bytes per image of the batch, for its crops and targets.
        image: Bytes per image of a part, for its activations.
        batch: Images per step in each process.
        at_once: Images per part of the batch in each process.
        seconds: Duration of the whole run in seconds.
    """

    parameters: int
    backbone_parameters: int
    flops: float
    fixed: float
    waiting: float
    image: float
    batch: int
    at_once: int
    seconds: float

    @property
    def memory(self) -> float:
        """Peak memory of a step in each process, in bytes."""
        return self.fixed + self.waiting * self.batch + self.image * self.at_once

    def fits(self, free: float) -> bool:
        """Return True if a step fits into `free` bytes of memory."""
        return self.memory <= _FILLED * free


def estimate(plan: Plan) -> Estimate:
    """Estimate a run: count operations and bytes on tensors without data, and time a matrix product on the device.

    If the crops change size, memory is estimated for the largest crops.
    """
    with torch.device("meta"):
        method = plan.method()
        train_only(method.student.backbone, plan.preset.backbone.learning.trained)
    phases = plan.phases
    total = sum(steps for steps, _ in phases)
    flops = sum((steps / total if total else 1 / len(phases)) * _flops(method, part) for steps, part in phases)
    _, plan = phases[-1]
    depth = len(method.student.blocks)
    (waiting, two), (_, four) = (_peak(plan, images, depth) for images in (2, 4))
    image = (four - two) / 2  # bytes grow linearly with the batch
    weights = _bytes(method.student)
    # The student's weights and average; gradient and AdamW's two moments of what is trained; frozen teachers and a Gram
    # teacher; and whatever the forward pass saves that does not grow with the batch, such as copies in bfloat16.
    trained = sum(p.numel() * p.element_size() for p in method.student.parameters() if p.requires_grad)
    fixed: float = (
        2 * weights + 3 * trained + sum(_bytes(method.get_submodule(name)) for name in method.frozen_modules())
    )
    if isinstance(method, FeatureDistillation):
        fixed += 4 * _bytes(method.adaptors)  # these have no average
    elif not isinstance(method, Classification) and method.gram:
        fixed += _bytes(method.gram)
    fixed += max(0.0, two - 2 * image)
    at_once = plan.images_each // plan.accumulate
    seconds = flops * plan.images_each * plan.stop / _rate(plan)
    return Estimate(
        parameters=_count(method.student),
        backbone_parameters=_count(method.student.backbone),
        flops=flops,
        fixed=fixed,
        waiting=waiting / 2,
        image=image,
        batch=plan.images_each,
        at_once=at_once,
        seconds=seconds,
    )


def to_fit(cost: Callable[[bool], Estimate], free: float) -> tuple[dict[str, str], Estimate] | None:
    """Find options that make a step fit into `free` bytes of memory.

    Args:
        cost: Function that estimates the run with undivided batches, without (False) or with (True) activation
            checkpointing.
        free: Free memory, in bytes.

    Returns:
        Command-line options, and the estimate with them. None if not even one image fits. The batch is split into the
        fewest parts that fit. Activation checkpointing is used only if parts that fit without it are too small to keep
        the device busy.
    """
    known = cache(cost)  # an estimate takes seconds
    for again, fewest in ((False, _BUSY), (True, _BUSY), (True, 1), (False, 1)):
        try:
            whole = known(again)
        except DinoError:  # this backbone has no blocks
            continue
        for parts in equal_parts(whole.at_once):
            tried = replace(whole, at_once=whole.at_once // parts)
            if tried.at_once >= min(fewest, whole.at_once) and tried.fits(free):
                typed = {"--recompute": ""} if again else {}
                return typed | ({"--accumulate": str(parts)} if parts > 1 else {}), tried
    return None


def _flops(method: AnyMethod, plan: Plan) -> float:
    """Count the operations per image of a step, on meta tensors, which have gradients on any machine."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        batch = _empty_batch(plan, _grid(plan, method), 2)
        torch.stack(list(method(*_parts(method, batch, plan)).values())).sum().backward()
    return counter.get_total_flops() / 2


def _parts(method: AnyMethod, batch: Batch, plan: Plan) -> Sequence[Any]:
    """Return the only part of a batch, as a step computes it."""
    method.before_step(_last(plan))
    return method.parts(method.prepare(batch), 1, _last(plan))  # type: ignore[arg-type]


def _peak(plan: Plan, images: int, depth: int) -> tuple[float, float]:
    """Return the bytes of all crops and targets, and the peak bytes of the student's forward and backward passes."""
    waiting, kept = _measure_memory(plan, images)
    if not plan.recompute:
        return waiting, kept
    # The backward pass recomputes the activations of one block at a time.
    return waiting, kept + (_measure_memory(replace(plan, recompute=False), images)[1] - kept) / depth


def _measure_memory(plan: Plan, images: int) -> tuple[float, float]:
    """Return the bytes of crops and targets, and those that the student's forward pass saves for backward."""
    kept: dict[int, Tensor] = {}  # by storage; references to the tensors stop torch from reusing an address

    def note(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with torch.device("meta"):
        method = plan.method()
        train_only(method.student.backbone, plan.preset.backbone.learning.trained)
    kind = plan.device.type if plan.device.type == "cuda" else "cpu"
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(kind):
        method = method.to_empty(device=kind)
        batch = _empty_batch(plan, _grid(plan, method), images)
        with autocast(plan.device, plan.precision):
            targets, outputs = _run_student(method, batch, plan, note)
    weights = _storages(method.parameters())
    clean = [] if batch.clean_crops is None else [batch.clean_crops]
    waiting = _storages([*targets, *batch.crops, *clean])
    turn = _storages([*kept.values(), *outputs])
    return sum(waiting.values()), sum(size for key, size in turn.items() if key not in weights | waiting)


def _run_student(
    method: AnyMethod, batch: Batch, plan: Plan, note: Callable[[Tensor], Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the targets of a batch and the student's outputs; `note` receives the tensors saved for backward."""
    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    if isinstance(method, FeatureDistillation):
        (features,) = _parts(method, batch, plan)
        with hooks:
            method(features)
        return [values for target in features.targets for values in (target.cls, target.patches)], []
    if isinstance(method, Classification):
        (labelled,) = _parts(method, batch, plan)
        with hooks:
            method(labelled)
        return [labelled.targets], []
    (part,) = _parts(method, batch, plan)
    with hooks:
        student = method.encode(part)
        if part.anchored:
            method.compare_patches(part, student)
    # Logits count once, because the losses overwrite them with their gradient.
    return list(part.targets.values()), [*student.class_logits.values(), *student.masked_logits.values()]


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Return the size in bytes of each storage of the tensors, by address."""
    return {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}


def _last(plan: Plan) -> Clock:
    """Return the clock of the last step: the first ones may lack a loss."""
    return replace(plan.clock, step=plan.clock.total - 1)


def _empty_batch(plan: Plan, grid: tuple[int, int] | None, images: int) -> Batch:
    views, clean_scale = plan.loaded_views, plan.preset.clean_scale
    c, size, rows, shown = views.channels, views.global_1.size, torch.arange(images, device="cpu"), len(views.globals)
    large, small, masks = torch.empty(shown, images, c, size, size), None, None
    if views.local and views.locals:
        small = torch.empty(views.locals, images, c, views.local.size, views.local.size)
    if views.mask and grid:
        patches = grid[0] * grid[1]
        masked = masked_in_all(views.mask, (shown, images), patches)
        where = torch.zeros(shown, images, patches, dtype=torch.bool)
        with torch.device("cpu"):
            counts = deal(views.mask, (shown, images), patches, seed=0, batch=0, rank=0)
        masks = PatchMasks(where, torch.arange(masked), torch.ones(masked), counts)
    clean = None
    if clean_scale is not None:
        side = views.clean_size(clean_scale)
        clean = torch.empty(shown, images, c, side, side)
    return Batch(large, small, rows, masks, clean)


def _grid(plan: Plan, method: AnyMethod) -> tuple[int, int] | None:
    return method.student.backbone.grid(plan.preset.views.global_1.size)


def _count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _bytes(module: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _rate(plan: Plan) -> float:
    """Estimate a step's operations per second, by timing a matrix product in the precision of training."""
    device = plan.device
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(plan.precision, torch.float32)
    coarse = device.type == "cpu" and dtype != torch.float32
    reached = _COARSE_ON_CPU if coarse else _EFFICIENCY[device.type]
    side = 1024 if device.type == "cpu" else 4096
    a = torch.randn(side, side, device=device, dtype=dtype)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        product = a @ a
        product[0, 0].item()  # waits for the device
        best = max(best, 2 * side**3 / (time.perf_counter() - start))
    return best * reached
