"""Optimizers and their configs, learning rates and weight decay per group, and gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from dinocli.core import foreach
from dinocli.core.config import Config
from dinocli.core.distributed import in_shards, local, norms
from dinocli.core.errors import DinoError
from dinocli.engine.method import ParamGroup
from dinocli.engine.schedules import Clock, Rate, Schedule


class LinearRule(Config):
    """Learning rate proportional to the batch size; the preset's rate is for `batch` images."""

    kind: Literal["linear"]
    batch: int = Field(gt=0)

    def factor(self, batch: int) -> float:
        """Return the factor on the learning rate."""
        return batch / self.batch


class SqrtRule(Config):
    """Learning rate proportional to the square root of the batch size; the preset's rate is for `batch` images."""

    kind: Literal["sqrt"]
    batch: int = Field(gt=0)

    def factor(self, batch: int) -> float:
        """Return the factor on the learning rate."""
        return math.sqrt(batch / self.batch)


RateRule = Annotated[LinearRule | SqrtRule, Field(discriminator="kind")]


class ClipEach(Config):
    """Clipping of each parameter's gradient to a norm of at most `norm`."""

    kind: Literal["each_parameter"]
    norm: float = Field(gt=0)

    def wholes(self, norms: Tensor, modules: Sequence[str]) -> Tensor:  # [n] -> [n]
        """Return the norm that is bounded for each parameter: that of its own gradient."""
        return norms


class ClipModules(Config):
    """Clipping of the joint gradient of each module (the backbone, each head) to a norm of at most `norm`."""

    kind: Literal["each_module"]
    norm: float = Field(gt=0)

    def wholes(self, norms: Tensor, modules: Sequence[str]) -> Tensor:  # [n] -> [n]
        """Return the norm that is bounded for each parameter: that of its module's gradient."""
        by_module: dict[str, list[Tensor]] = {}
        for norm, module in zip(norms.unbind(), modules, strict=True):
            by_module.setdefault(module, []).append(norm)
        joint = {module: torch.linalg.vector_norm(torch.stack(part)) for module, part in by_module.items()}
        return torch.stack([joint[module] for module in modules])


Clip = Annotated[ClipEach | ClipModules, Field(discriminator="kind")]


class _Optimizer(Config):
    """Settings that all optimizers share.

    Attributes:
        lr: Learning rate over the run, before `lr_rule`.
        lr_rule: Scaling of the learning rate with the batch size. If None, there is no scaling.
        weight_decay: Weight decay over the run.
        clip: Bound on the gradient norm. If None, gradients are not clipped.
    """

    lr: Rate
    lr_rule: RateRule | None = None
    weight_decay: Schedule
    clip: Clip | None = None

    def lr_for(self, batch: int) -> Rate:
        """Return the learning rate's schedule for a batch size."""
        return self.lr.scaled(self.lr_rule.factor(batch)) if self.lr_rule else self.lr

    def apply_decay(self, group: dict[str, Any], weight_decay: Tensor, done: Tensor) -> None:
        """Shrink the parameters of a group, as the step of AdamW or Muon would for a number on the host."""
        parameters = [p for p in group["params"] if p.grad is not None]
        if parameters:
            factor = torch.where(done, 1 - group["lr"] * weight_decay, 1.0)
            torch._foreach_mul_(parameters, factor.to(parameters[0].dtype))


Fraction = Annotated[float, Field(ge=0, lt=1)]


class AdamWConfig(_Optimizer):
    """AdamW."""

    kind: Literal["adamw"]
    betas: tuple[Fraction, Fraction]
    eps: float = Field(1e-8, gt=0)

    def build(self, groups: Sequence[ParamGroup]) -> torch.optim.Optimizer:
        """Build the optimizer over the groups."""
        # Learning rate and decay are 0 here, because `set_rates` sets both before every step.
        return torch.optim.AdamW(
            _to_dicts(groups), lr=0.0, betas=self.betas, eps=self.eps, weight_decay=0.0, fused=True
        )


class MuonConfig(_Optimizer):
    """Muon for the matrices of hidden layers, AdamW for all other parameters.

    Attributes:
        momentum: Momentum of the matrices.
        matrix_rate: Factor on the learning rate of the matrices. At 1, their updates are as large as AdamW's mostly.
        betas: Momenta of AdamW.
        eps: Epsilon of AdamW.
    """

    kind: Literal["muon"]
    momentum: Fraction
    matrix_rate: float = Field(gt=0)
    betas: tuple[Fraction, Fraction]
    eps: float = Field(1e-8, gt=0)

    def build(self, groups: Sequence[ParamGroup]) -> torch.optim.Optimizer:
        """Build the optimizer over the groups.

        Raises:
            DinoError: If the parameters are sharded: no process has a whole matrix.
        """
        if in_shards([p for group in groups for p in group.params]):
            raise DinoError("Muon does not support --parallel fsdp: its step needs whole matrices", _SHARDING_HINT)
        parts: list[dict[str, Any]] = []
        for group in groups:
            for hidden in (False, True):
                which = [i for i in range(len(group.params)) if bool(group.hidden and group.hidden[i]) == hidden]
                rate = group.lr_scale * (self.matrix_rate if hidden else 1)
                modules = [group.modules[i] for i in which] if group.modules else []
                parameters = [group.params[i] for i in which]
                part = ParamGroup(parameters, group.decay, rate, group.frozen_epochs, modules)
                parts += [made | {"hidden": hidden} for made in _to_dicts([part])]
        return Muon(parts, betas=self.betas, eps=self.eps, momentum=self.momentum)


_SHARDING_HINT = "--parallel ddp, or --set optimizer.kind=adamw with its own keys"


class SGDConfig(_Optimizer):
    """SGD with momentum."""

    kind: Literal["sgd"]
    momentum: float = Field(ge=0, lt=1)

    def build(self, groups: Sequence[ParamGroup]) -> torch.optim.Optimizer:
        """Build the optimizer over the groups.

        Raises:
            DinoError: If the parameters are sharded, which torch's SGD step does not support.
        """
        if in_shards([p for group in groups for p in group.params]):
            raise DinoError(
                "SGD does not support --parallel fsdp: torch's step needs unsharded parameters", _SHARDING_HINT
            )
        optimizer = torch.optim.SGD(_to_dicts(groups), lr=0.0, momentum=self.momentum, fused=True)
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            # torch would create these zeros in its first step, but that step may be skipped.
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return optimizer

    def apply_decay(self, group: dict[str, Any], weight_decay: Tensor, done: Tensor) -> None:
        """Add the decay to the gradients of a group, as the step of torch would for a number on the host."""
        parameters = [p for p in group["params"] if p.grad is not None]
        if parameters:
            decays = torch._foreach_mul(parameters, weight_decay.to(parameters[0].dtype))
            torch._foreach_add_([p.grad for p in parameters], decays)


class LARSConfig(_Optimizer):
    """LARS: SGD with its step scaled to each weight's norm."""

    kind: Literal["lars"]
    momentum: float = Field(ge=0, lt=1)
    trust: float = Field(gt=0)

    def build(self, groups: Sequence[ParamGroup]) -> torch.optim.Optimizer:
        """Build the optimizer over the groups."""
        return LARS(_to_dicts(groups), momentum=self.momentum, trust=self.trust)

    def apply_decay(self, group: dict[str, Any], weight_decay: Tensor, done: Tensor) -> None:
        """Set the weight decay of a group, which the step takes as a tensor too."""
        group["weight_decay"] = weight_decay


OptimizerConfig = Annotated[AdamWConfig | SGDConfig | LARSConfig | MuonConfig, Field(discriminator="kind")]


def _to_dicts(groups: Sequence[ParamGroup]) -> list[dict[str, Any]]:
    return [
        {
            "params": g.params,
            "decay": g.decay,
            "lr_scale": g.lr_scale,
            "frozen_epochs": g.frozen_epochs,
            "modules": g.modules or [""] * len(g.params),
        }
        for g in groups
        if g.params
    ]


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling; one-dimensional parameters take steps of plain SGD without weight decay.

    Source: arXiv 1708.03888; facebookresearch/dino@7c446df utils.py, LARS.
    """

    def __init__(self, params: Iterable[dict[str, Any]], momentum: float, trust: float) -> None:
        super().__init__(params, {"lr": 0.0, "weight_decay": 0.0, "momentum": momentum, "trust": trust})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; skip the step if `found_inf` is 1, as torch's optimizers do."""
        skipped = getattr(self, "found_inf", None)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                update = p.grad
                if p.ndim != 1:
                    update = update + group["weight_decay"] * p
                    weight_norm, update_norm = p.norm(), update.norm()
                    ratio = group["trust"] * weight_norm / update_norm
                    scaled = (weight_norm > 0) & (update_norm > 0)
                    update = update * torch.where(scaled, ratio, torch.ones_like(ratio))
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                old = state["momentum"]
                new = old * group["momentum"] + update
                moved = p - group["lr"] * new
                # In place, because a graph of the step writes to fixed addresses.
                old.copy_(new if skipped is None else torch.where(skipped > 0, old, new))
                p.copy_(moved if skipped is None else torch.where(skipped > 0, p, moved))


class Muon(torch.optim.AdamW):
    """Muon for the groups with `hidden`, AdamW for the others.

    The momentum of a matrix is made nearly orthogonal, and the step has the root mean square that those of AdamW mostly
    have, so that both take the same learning rate.

    Source: K. Jordan, Muon, 2024; the scale: arXiv 2502.16982, section 2.2. torch.optim.Muon computes the same, but
    cannot skip a step.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], betas: tuple[float, float], eps: float, momentum: float
    ) -> None:
        super().__init__(groups, lr=0.0, betas=betas, eps=eps, weight_decay=0.0, fused=True)
        self._momentum = momentum

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; skip the step if `found_inf` is 1, as torch's optimizers do."""
        skipped = getattr(self, "found_inf", None)
        for group in self.param_groups:
            matrices = [p for p in group["params"] if p.grad is not None] if group["hidden"] else []
            for alike in _group_by_shape(matrices):
                self._move(alike, group, skipped)
                for p in alike:
                    p.grad = None  # nothing is left for AdamW
        super().step()

    def _move(self, matrices: list[Tensor], group: dict[str, Any], skipped: Tensor | None) -> None:
        """Update matrices of one shape."""
        for p in matrices:
            if "momentum" not in self.state[p]:
                # AdamW looks for the step when a state is loaded.
                self.state[p] |= {"step": torch.zeros(()), "momentum": torch.zeros_like(p)}
        momenta = [self.state[p]["momentum"] for p in matrices]
        gradients = torch.stack([p.grad for p in matrices if p.grad is not None])
        old, before = torch.stack(momenta), torch.stack(matrices)
        new = old.lerp(gradients, 1 - self._momentum)
        update = orthogonal(gradients.lerp(new, self._momentum)) * (0.2 * max(before.shape[1:]) ** 0.5)
        moved = before * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * update
        if skipped is not None:
            new, moved = torch.where(skipped > 0, old, new), torch.where(skipped > 0, before, moved)
        # In place, because a graph of the step writes to fixed addresses.
        torch._foreach_copy_(momenta, list(new.unbind()))
        torch._foreach_copy_(matrices, list(moved.unbind()))


_STACKED = 2**24  # most values updated together; bounds the memory of the copies


def _group_by_shape(matrices: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield lists of matrices of one shape, in as few launches as their copies' memory allows."""
    for shape in dict.fromkeys(p.shape for p in matrices):
        alike = [p for p in matrices if p.shape == shape]
        count = max(1, _STACKED // shape.numel())
        yield from (alike[i : i + count] for i in range(0, len(alike), count))


def orthogonal(matrices: Tensor) -> Tensor:
    """Bring all singular values of matrices near 1 by five Newton-Schulz iterations in bfloat16. [n, r, c] -> [n, r, c]

    Source: K. Jordan, Muon, 2024, with its coefficients.
    """
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return (x.mT if tall else x).to(matrices.dtype)


def set_rates(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Set the learning rate and weight decay of every group for the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
        group["weight_decay"] = weight_decay if group["decay"] else 0.0


def step_unless_skipped(optimizer: torch.optim.Optimizer, done: Tensor) -> None:
    """Take the optimizer's step and free the gradients; skip the step if `done` is False.

    The host does not read `done`, which would make it wait for the device. Instead it sets `found_inf`, torch's switch
    for loss scaling, with which the device skips the step and preserves moments and counts too.
    """
    optimizer.found_inf = (~done).float()  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def step_with_tensors(
    config: OptimizerConfig, optimizer: torch.optim.Optimizer, lr: Tensor, weight_decay: Tensor, done: Tensor
) -> None:
    """Take the optimizer's step like `step_unless_skipped`, with rates that are on the device.

    torch's fused steps take a learning rate on the device, but no weight decay. So that is applied before the step. The
    rates of the groups, which are on the host, do not count and do not change.
    """
    before = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = (lr * group["lr_scale"]).float(), 0.0
        if group["decay"]:
            config.apply_decay(group, weight_decay, done)
    step_unless_skipped(optimizer, done)
    for group, rates in zip(optimizer.param_groups, before, strict=True):
        group["lr"], group["weight_decay"] = rates


def drop_frozen(optimizer: torch.optim.Optimizer, clock: Clock) -> None:
    """Remove the gradients of groups that are still frozen, so that the optimizer skips them entirely."""
    for group in optimizer.param_groups:
        if clock.epoch < group["frozen_epochs"]:
            for p in group["params"]:
                p.grad = None


@torch.no_grad()
def clip_gradients(optimizer: torch.optim.Optimizer, clip: Clip | None) -> Tensor:
    """Clip the gradients in place, and return their total norm before clipping. []"""
    grads, modules = [], []
    for group in optimizer.param_groups:
        for p, module in zip(group["params"], group["modules"], strict=True):
            if p.grad is not None:
                grads.append(p.grad)
                modules.append(module)
    grad_norms = norms(grads)
    if clip is not None:
        bounded = clip.wholes(grad_norms, modules)
        foreach.scale(local(grads), (clip.norm / (bounded + 1e-6)).clamp(max=1.0))
    return torch.linalg.vector_norm(grad_norms)
