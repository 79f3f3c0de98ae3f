"""Clipping, AdamW and a moving average in one launch each, as Triton kernels over tables of addresses.

torch launches several kernels for each list of tensors, and one per tensor if factors are on the device. These kernels
read the addresses of all tensors from a table. Each program computes a chunk of one tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dinocli.core import foreach
from dinocli.core.errors import reason_of
from dinocli.engine.optim import AdamWConfig

_CHUNK = 4096  # numbers per program


class Chunks:
    """Chunks of n tensors, as tables on their device.

    Attributes:
        tensors: Place of each chunk's tensor in the list. [C], int32
        starts: First number of each chunk in its tensor. [C], int64
        sizes: Number of numbers of each tensor. [n], int64
        firsts: First chunk of each tensor, and the number of chunks. [n + 1], int32
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        device, counts = tensors[0].device, [-(-tensor.numel() // _CHUNK) for tensor in tensors]
        owners = [i for i, count in enumerate(counts) for _ in range(count)]
        starts = [_CHUNK * k for count in counts for k in range(count)]
        firsts = [sum(counts[:i]) for i in range(len(counts) + 1)]
        self.count = len(owners)
        self.tensors = torch.tensor(owners, dtype=torch.int32, device=device)
        self.starts = torch.tensor(starts, dtype=torch.int64, device=device)
        self.sizes = torch.tensor([tensor.numel() for tensor in tensors], dtype=torch.int64, device=device)
        self.firsts = torch.tensor(firsts, dtype=torch.int32, device=device)


class Addresses:
    """Tables of the addresses of tensors, which are copied to the device only if they change.

    A capture cannot copy from the host. So a table of a capture stays empty until `fill` is called after it.
    """

    def __init__(self) -> None:
        self._known: list[int] = []
        self._table = torch.empty(0)
        self._captured: list[tuple[Tensor, list[int]]] = []

    def of(self, tensors: Sequence[Tensor | None], device: torch.device) -> Tensor:
        """Return the addresses of n tensors; 0 for None. [n], int64"""
        found = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self._captured.append((torch.empty(len(found), dtype=torch.int64, device=device), found))
            return self._captured[-1][0]
        if found != self._known:
            self._known, self._table = found, torch.tensor(found, device=device)
        return self._table

    def fill(self) -> None:
        """Fill the tables of captures, which must stay in memory as long as their graphs."""
        for table, found in self._captured:
            table.copy_(torch.tensor(found))


class FusedAdamW:
    """Clipping and AdamW for unsharded parameters in float32.

    The results are those of `clip_gradients` and of torch's fused AdamW, up to rounding. Gradients stay unclipped.

    Args:
        optimizer: Optimizer that `AdamWConfig.build` returned. Its state keeps its form.
        config: Settings of the optimizer.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, config: AdamWConfig) -> None:
        groups = optimizer.param_groups
        self.optimizer, self.config = optimizer, config
        self.parameters = [p for group in groups for p in group["params"]]
        self.device = self.parameters[0].device
        count, modules = len(self.parameters), [name for group in groups for name in group["modules"]]
        joint = config.clip is not None and config.clip.kind == "each_module"
        owners = [modules.index(name) for name in modules] if joint else list(range(count))
        self._chunks = Chunks(self.parameters)
        self._owners = torch.tensor(owners, dtype=torch.int32, device=self.device)
        self._scales, self._decays = (
            torch.tensor([float(g[key]) for g in groups for _ in g["params"]], dtype=torch.float64, device=self.device)
            for key in ("lr_scale", "decay")
        )
        self._sums = torch.zeros(self._chunks.count, device=self.device)
        self._norms = torch.zeros(count, device=self.device)
        self._steps, self._state = torch.zeros(count, device=self.device), torch.empty(0)
        self._all, self._moving = Addresses(), Addresses()  # of the gradients to clip, and of those to follow

    def clip(self) -> Tensor:
        """Compute the norms of the gradients, by which `step` clips them, and return their total norm. []"""
        if not len(self._state):
            self._adopt_state()
        chunks, gradients = self._chunks, self._all.of([p.grad for p in self.parameters], self.device)
        _sum_squares[(chunks.count,)](gradients, chunks.tensors, chunks.starts, chunks.sizes, self._sums, CHUNK=_CHUNK)
        _find_norms[(len(self.parameters),)](self._sums, chunks.firsts, self._norms, WIDTH=256)
        return torch.linalg.vector_norm(self._norms)

    def step(self, lr: Tensor, weight_decay: Tensor, done: Tensor) -> None:
        """Clip the gradients, take the optimizer's step unless `done` is False, and free the gradients.

        Args:
            lr: Learning rate before the factors of the groups. [], float64
            weight_decay: Weight decay of the groups that have one. [], float64
            done: False to skip the step. [], bool
        """
        config, chunks, count = self.config, self._chunks, len(self.parameters)
        gradients = self._moving.of([p.grad for p in self.parameters], self.device)
        _adamw[(chunks.count,)](
            gradients, self._state, chunks.tensors, chunks.starts, chunks.sizes, self._owners, self._norms,
            self._scales, self._decays, self._steps, lr, weight_decay, done, count,
            BETA1=config.betas[0], BETA2=config.betas[1],
            LOG1=_log2(config.betas[0]), LOG2=_log2(config.betas[1]), EPS=config.eps,
            CLIP=config.clip.norm if config.clip else 0.0, WIDTH=triton.next_power_of_2(count), CHUNK=_CHUNK,
        )  # fmt: skip
        _count_steps[(1,)](gradients, self._steps, done, count, WIDTH=triton.next_power_of_2(count))
        self.optimizer.zero_grad(set_to_none=True)

    def fill(self) -> None:
        """Complete a capture; call this after it and before its first replay."""
        self._all.fill()
        self._moving.fill()

    def _adopt_state(self) -> None:
        """Create missing moments, and join the counts of steps; the optimizer's state gets views of these."""
        for i, p in enumerate(self.parameters):
            slots = self.optimizer.state[p]
            for name in ("exp_avg", "exp_avg_sq"):
                slots.setdefault(name, torch.zeros_like(p, memory_format=torch.preserve_format))
            if "step" in slots:
                self._steps[i] = slots["step"]
            slots["step"] = self._steps[i]
        states = [self.optimizer.state[p] for p in self.parameters]
        rows = [self.parameters, *([slots[name] for slots in states] for name in ("exp_avg", "exp_avg_sq"))]
        self._state = torch.tensor([[tensor.data_ptr() for tensor in row] for row in rows], device=self.device)


class Mover:
    """Moving average of many parameters in one launch; `foreach.move` moves other tensors."""

    def __init__(self) -> None:
        self._known: list[int] = []

    def __call__(self, tensors: Sequence[Tensor], towards: Sequence[Tensor], weight: Tensor) -> None:
        """Move each tensor towards another by the same weight, in place, like `foreach.move`."""
        both = [*tensors, *towards]
        if not all(fits(tensor) and isinstance(tensor, torch.nn.Parameter) for tensor in both):
            foreach.move(tensors, towards, weight)
            return
        found = [tensor.data_ptr() for tensor in both]
        if found != self._known:
            self._known, self._table = found, torch.tensor(found, device=weight.device)
            self._chunks = Chunks(tensors)
        chunks, count = self._chunks, len(tensors)
        _move[(chunks.count,)](
            self._table, chunks.tensors, chunks.starts, chunks.sizes, weight, count, CHUNK=_CHUNK
        )  # fmt: skip


def fits(tensor: Tensor) -> bool:
    """Return True if the kernels can read a tensor."""
    return tensor.dtype == torch.float32 and tensor.is_contiguous()


def why_not(device: torch.device) -> str | None:
    """Run all kernels on a device, and return their error in one line; None if they work."""
    try:
        config = AdamWConfig.model_validate(
            {
                "kind": "adamw",
                "betas": (0.9, 0.999),
                "lr": 0.1,
                "weight_decay": 0.1,
                "clip": {"kind": "each_parameter", "norm": 1},
            }
        )
        p, number = (
            torch.nn.Parameter(torch.ones(4, device=device)),
            torch.zeros((), dtype=torch.float64, device=device),
        )
        p.grad = torch.ones_like(p)
        group = {"params": [p], "modules": [""], "lr_scale": 1.0, "decay": True}
        update = FusedAdamW(torch.optim.AdamW([group], lr=0.0, fused=True), config)
        update.clip()
        update.step(number, number, number == 0)
        Mover()([p], [torch.nn.Parameter(torch.ones_like(p))], number.float())
    except Exception as error:  # no compiler, an unknown Python: any error counts
        return reason_of(error)
    return None


def _log2(beta: float) -> float:
    return math.log2(beta) if beta else -1e6  # whose powers of 2 are 0, as those of beta


@triton.jit
def _sum_squares(gradients, tensors, starts, sizes, sums, CHUNK: tl.constexpr):
    """Store the sum of the squares of each chunk of the gradients; 0 if there is no gradient."""
    chunk = tl.program_id(0)
    tensor = tl.load(tensors + chunk)
    gradient = tl.load(gradients + tensor)
    places = tl.load(starts + chunk) + tl.arange(0, CHUNK)
    present = (places < tl.load(sizes + tensor)) & (gradient != 0)
    values = tl.load(gradient.to(tl.pointer_type(tl.float32)) + places, mask=present, other=0.0)
    tl.store(sums + chunk, tl.sum(values * values))


@triton.jit
def _find_norms(sums, firsts, norms, WIDTH: tl.constexpr):
    """Store the norm of each gradient, from the sums of its chunks in a fixed order."""
    tensor = tl.program_id(0)
    first, end = tl.load(firsts + tensor), tl.load(firsts + tensor + 1)
    total = tl.zeros([WIDTH], dtype=tl.float32)
    for start in range(first, end, WIDTH):
        places = start + tl.arange(0, WIDTH)
        total += tl.load(sums + places, mask=places < end, other=0.0)
    tl.store(norms + tensor, tl.sqrt(tl.sum(total)))


@triton.jit
def _adamw(
    gradients,  # [n]
    state,  # addresses of parameters, first and second moments [3, n]
    tensors,
    starts,
    sizes,
    owners,  # number of the module whose norm is bounded [n]
    norms,  # [n]
    scales,  # [n]
    decays,  # [n]
    steps,  # steps before this one [n]
    lr,
    weight_decay,
    done,
    count,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    LOG1: tl.constexpr,
    LOG2: tl.constexpr,
    EPS: tl.constexpr,
    CLIP: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Update a chunk of the parameters and their moments; skip those without a gradient."""
    chunk = tl.program_id(0)
    tensor = tl.load(tensors + chunk)
    gradient = tl.load(gradients + tensor)
    places = tl.load(starts + chunk) + tl.arange(0, CHUNK)
    moves = (places < tl.load(sizes + tensor)) & (gradient != 0) & (tl.load(done) != 0)
    values = tl.load(gradient.to(tl.pointer_type(tl.float32)) + places, mask=moves, other=0.0)
    if CLIP > 0:
        others = tl.arange(0, WIDTH)
        mine = (others < count) & (tl.load(owners + others, mask=others < count, other=-1) == tl.load(owners + tensor))
        each = tl.load(norms + others, mask=mine, other=0.0)
        values *= tl.minimum(CLIP / (tl.sqrt(tl.sum(each * each)) + 1e-6), 1.0)
    p = tl.load(state + tensor).to(tl.pointer_type(tl.float32)) + places
    m = tl.load(state + count + tensor).to(tl.pointer_type(tl.float32)) + places
    v = tl.load(state + 2 * count + tensor).to(tl.pointer_type(tl.float32)) + places
    # In float64, because 1 - beta2 ** step has few digits at first. It is one number per program.
    step = tl.load(steps + tensor).to(tl.float64) + 1
    rate = tl.load(lr) * tl.load(scales + tensor)
    shrink = (1 - rate * tl.load(weight_decay) * tl.load(decays + tensor)).to(tl.float32)
    size = (rate / (1 - tl.exp2(step * LOG1))).to(tl.float32)
    root = tl.sqrt(1 - tl.exp2(step * LOG2)).to(tl.float32)
    first = tl.load(m, mask=moves, other=0.0)
    second = tl.load(v, mask=moves, other=0.0)
    first += (1 - BETA1) * (values - first)
    second = BETA2 * second + (1 - BETA2) * values * values
    moved = tl.load(p, mask=moves, other=0.0) * shrink - size * first / (tl.sqrt(second) / root + EPS)
    tl.store(m, first, mask=moves)
    tl.store(v, second, mask=moves)
    tl.store(p, moved, mask=moves)


@triton.jit
def _count_steps(gradients, steps, done, count, WIDTH: tl.constexpr):
    """Count the step of each parameter with a gradient."""
    places = tl.arange(0, WIDTH)
    inside = places < count
    moves = inside & (tl.load(gradients + places, mask=inside, other=0) != 0) & (tl.load(done) != 0)
    tl.store(steps + places, tl.load(steps + places, mask=moves, other=0.0) + 1, mask=moves)


@triton.jit
def _move(table, tensors, starts, sizes, weight, count, CHUNK: tl.constexpr):
    """Move a chunk of the tensors towards others; the table has the addresses of both. [2, n]"""
    chunk = tl.program_id(0)
    tensor = tl.load(tensors + chunk)
    places = tl.load(starts + chunk) + tl.arange(0, CHUNK)
    inside = places < tl.load(sizes + tensor)
    own = tl.load(table + tensor).to(tl.pointer_type(tl.float32)) + places
    other = tl.load(table + count + tensor).to(tl.pointer_type(tl.float32)) + places
    a, b, w = tl.load(own, mask=inside), tl.load(other, mask=inside), tl.load(weight)
    # Both ends are exact, as in torch's lerp.
    tl.store(own, tl.where(w < 0.5, a + w * (b - a), b - (b - a) * (1 - w)), mask=inside)
