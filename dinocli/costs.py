"""Costs: what a run takes in memory, work and time, before it does anything."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dinocli.data.crops import ViewsConfig
from dinocli.data.loader import Batch
from dinocli.data.masking import Masks, hidden_in_all
from dinocli.device import autocast, has_bfloat16
from dinocli.distillation import SelfDistillation
from dinocli.errors import DinoError
from dinocli.planning import Plan, equal_parts

# Share of a bare matrix product's rate that a whole step reaches: on a CPU measured 0.75 in float32, and 0.22 in
# bfloat16, whose products outrun all that is between them; on a GPU published ViT runs and DINO's own logs say 0.25 to
# 0.4.
_EFFICIENCY = {"cpu": 0.7, "cuda": 0.3, "mps": 0.3}
_COARSE_ON_CPU = 0.22
_FILLED = 0.9  # share of what is free that a step may take: the device needs some for itself, and leaves gaps
_BUSY = 16  # images that are still enough at once to keep a device busy


@dataclass(frozen=True)
class Estimate:
    """What a run will take.

    Attributes:
        parameters: Of the student: backbone and heads.
        backbone_parameters: Of the backbone alone.
        flops: Floating-point operations an image, student and teacher, forward and backward; where crops change their
            size on the way, on average over the run.
        fixed: Bytes that are in use whatever the batch: weights, gradients, moments.
        waiting: Bytes more for each image of the batch: its crops, and what the teacher says of it.
        image: Bytes more for each image that is taken at once.
        batch: Images of a step, in each process.
        at_once: Images that each process takes at once.
        seconds: Of the whole run.
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
        """Bytes at the peak of a step, in each process."""
        return self.fixed + self.waiting * self.batch + self.image * self.at_once

    def fits(self, free: float) -> bool:
        """Whether a step fits into memory of which so many bytes are free."""
        return self.memory <= _FILLED * free


def estimate(plan: Plan) -> Estimate:
    """Count a step's operations and bytes on tensors without data, and time a matrix product for the device's rate.

    Where crops change their size on the way, the bytes are those of the largest that the run comes to.
    """
    with torch.device("meta"):
        method = plan.method()
    phases = plan.phases
    flops = sum((steps or 1) / max(1, plan.stop) * _flops(method, part) for steps, part in phases)
    _, plan = phases[-1]
    depth = len(method.student.blocks())
    (waiting, two), (_, four) = (_peak(plan, images, depth) for images in (2, 4))
    image = (four - two) / 2  # bytes are a straight line over the batch
    weights = _bytes(method.student)
    # Student, its gradient, two moments, average; and what of the student is held in another precision.
    fixed = 5 * weights + (_bytes(method.teacher) if plan.teacher else 0) + max(0.0, two - 2 * image)
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
    """What to type so that a step fits into memory of which so many bytes are free, and what it then takes.

    Args:
        cost: Of a run that takes its batch at once, without and with blocks worked out again for the gradient.
        free: Bytes.

    Returns:
        The fewest parts in which it fits, with images enough at once to keep a device busy if that can be had, with
        blocks worked out again if need be; absent where one image does not fit.
    """
    known = cache(cost)  # to work one out takes seconds
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


def _flops(method: SelfDistillation, plan: Plan) -> float:
    """Operations an image of a step; on tensors that are nowhere, which have a gradient on any machine."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        batch = _empty_batch(plan.preset.views, _grid(plan, method), 2)
        torch.stack(list(method(*method.parts(batch, 1, plan.clock)).values())).sum().backward()
    return counter.get_total_flops() / 2


def _peak(plan: Plan, images: int, depth: int) -> tuple[float, float]:
    """Bytes that wait for the whole batch, and those at the peak of the student's turn."""
    waiting, kept = _kept(plan, images)
    if not plan.recompute:
        return waiting, kept
    # One block's are there again while its gradient is worked out.
    return waiting, kept + (_kept(replace(plan, recompute=False), images)[1] - kept) / depth


def _kept(plan: Plan, images: int) -> tuple[float, float]:
    """Bytes of crops and targets, and those that the student's forward pass keeps for the backward one."""
    kept: dict[int, Tensor] = {}  # by storage; with the tensors, so that no storage gets the place of another

    def note(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with torch.device("meta"):
        method = plan.method()
    kind = plan.device.type if plan.device.type == "cuda" else "cpu"
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(kind):
        method = method.to_empty(device=kind)
        batch = _empty_batch(plan.preset.views, _grid(plan, method), images)
        with autocast(plan.device, plan.preset.training.precision):
            (part,) = method.parts(batch, 1, plan.clock)
            masks = batch.masks
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                student = method.student(batch.crops, masks and masks.where, masks and masks.rows)
    weights = _storages(method.parameters())
    waiting = _storages([*part.targets.values(), *batch.crops])
    # Logits turn into their gradient in place.
    turn = _storages([*kept.values(), *student.logits.values(), *student.hidden.values()])
    return sum(waiting.values()), sum(size for key, size in turn.items() if key not in weights | waiting)


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of what lies behind tensors, each counted once."""
    return {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}


def _empty_batch(views: ViewsConfig, grid: tuple[int, int] | None, images: int) -> Batch:
    c, size, rows, shown = views.channels, views.global_1.size, torch.arange(images, device="cpu"), len(views.globals)
    large, small, masks = torch.empty(shown, images, c, size, size), None, None
    if views.local and views.locals:
        small = torch.empty(views.locals, images, c, views.local.size, views.local.size)
    if views.mask and grid:
        patches = grid[0] * grid[1]
        hidden = hidden_in_all(views.mask, (shown, images), patches)
        where = torch.zeros(shown, images, patches, dtype=torch.bool)
        counts = torch.zeros(shown, images, dtype=torch.int64, device="cpu")
        masks = Masks(where, torch.arange(hidden), torch.ones(hidden), counts)
    return Batch(large, small, rows, masks)


def _grid(plan: Plan, method: SelfDistillation) -> tuple[int, int] | None:
    return method.student.backbone.grid(plan.preset.views.global_1.size)


def _count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _bytes(module: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _rate(plan: Plan) -> float:
    """Operations a second, from a matrix product in the precision of training."""
    device = plan.device
    half = plan.preset.training.precision == "bfloat16" and has_bfloat16(device)
    reached = _COARSE_ON_CPU if half and device.type == "cpu" else _EFFICIENCY[device.type]
    side = 1024 if device.type == "cpu" else 4096
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16 if half else torch.float32)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        product = a @ a
        product[0, 0].item()  # waits for the device
        best = max(best, 2 * side**3 / (time.perf_counter() - start))
    return best * reached
