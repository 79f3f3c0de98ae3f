"""Optimizers from their configs; rates at a step; clipping."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from dinocli.config import Config
from dinocli.distributed import in_shards, local, norms
from dinocli.engine.method import ParamGroup
from dinocli.errors import DinoError
from dinocli.schedules import Clock, Rate, Schedule


class LinearRule(Config):
    """The rate grows in proportion to the batch; the preset's is for `batch` images."""

    kind: Literal["linear"]
    batch: int = Field(gt=0)

    def factor(self, batch: int) -> float:
        """What to multiply the rate by."""
        return batch / self.batch


class SqrtRule(Config):
    """The rate grows with the square root of the batch; the preset's is for `batch` images."""

    kind: Literal["sqrt"]
    batch: int = Field(gt=0)

    def factor(self, batch: int) -> float:
        """What to multiply the rate by."""
        return math.sqrt(batch / self.batch)


RateRule = Annotated[LinearRule | SqrtRule, Field(discriminator="kind")]


class ClipEach(Config):
    """Scale each parameter's gradient on its own to a norm of at most `norm`."""

    kind: Literal["each_parameter"]
    norm: float = Field(gt=0)

    def wholes(self, norms: Sequence[Tensor], modules: Sequence[str]) -> list[Tensor]:
        """For each parameter the norm that is bounded: of its own gradient. [] each"""
        return list(norms)


class ClipModules(Config):
    """Scale the gradient of each module (backbone, a head) as a whole to a norm of at most `norm`."""

    kind: Literal["each_module"]
    norm: float = Field(gt=0)

    def wholes(self, norms: Sequence[Tensor], modules: Sequence[str]) -> list[Tensor]:
        """For each parameter the norm that is bounded: of the gradient of its module. [] each"""
        parts: dict[str, list[Tensor]] = {}
        for norm, module in zip(norms, modules, strict=True):
            parts.setdefault(module, []).append(norm)
        whole = {module: torch.linalg.vector_norm(torch.stack(part)) for module, part in parts.items()}
        return [whole[module] for module in modules]


Clip = Annotated[ClipEach | ClipModules, Field(discriminator="kind")]


class _Optimizer(Config):
    """What all optimizers share.

    Attributes:
        lr: Learning rate over the run, before `lr_rule`.
        lr_rule: How the rate follows the batch size; absent, it does not.
        weight_decay: Over the run.
        clip: Bound on the gradient; absent, there is none.
    """

    lr: Rate
    lr_rule: RateRule | None = None
    weight_decay: Schedule
    clip: Clip | None = None

    def lr_for(self, batch: int) -> Rate:
        """The schedule of the rate for a batch size."""
        return self.lr.scaled(self.lr_rule.factor(batch)) if self.lr_rule else self.lr


Share = Annotated[float, Field(ge=0, lt=1)]


class AdamWConfig(_Optimizer):
    """AdamW."""

    kind: Literal["adamw"]
    betas: tuple[Share, Share]
    eps: float = Field(1e-8, gt=0)

    def build(self, groups: Sequence[ParamGroup]) -> torch.optim.Optimizer:
        """The optimizer over the groups."""
        return torch.optim.AdamW(
            _as_dicts(groups), lr=0.0, betas=self.betas, eps=self.eps, weight_decay=0.0, fused=True
        )


_NO_SHARDS = "--parallel ddp, or --set optimizer.kind=adamw with what that needs"


class SGDConfig(_Optimizer):
    """SGD with momentum."""

    kind: Literal["sgd"]
    momentum: float = Field(ge=0, lt=1)

    def build(self, groups: Sequence[ParamGroup]) -> torch.optim.Optimizer:
        """The optimizer over the groups.

        Raises:
            DinoError: They lie in shards, for which torch has no such step.
        """
        if in_shards([p for group in groups for p in group.params]):
            raise DinoError("SGD was asked for with --parallel fsdp; torch has it for whole parameters", _NO_SHARDS)
        optimizer = torch.optim.SGD(_as_dicts(groups), lr=0.0, momentum=self.momentum, fused=True)
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            # torch's own start, but in being before a first step that may be left out.
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return optimizer


class LARSConfig(_Optimizer):
    """LARS: SGD whose step is scaled to each weight's norm."""

    kind: Literal["lars"]
    momentum: float = Field(ge=0, lt=1)
    trust: float = Field(gt=0)

    def build(self, groups: Sequence[ParamGroup]) -> torch.optim.Optimizer:
        """The optimizer over the groups."""
        return LARS(_as_dicts(groups), momentum=self.momentum, trust=self.trust)


OptimizerConfig = Annotated[AdamWConfig | SGDConfig | LARSConfig, Field(discriminator="kind")]


def _as_dicts(groups: Sequence[ParamGroup]) -> list[dict[str, Any]]:
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
    """Layer-wise adaptive rate scaling; one-dimensional parameters are moved as by plain SGD without decay.

    Source: arXiv 1708.03888; facebookresearch/dino@7c446df utils.py, LARS.
    """

    def __init__(self, params: Iterable[dict[str, Any]], momentum: float, trust: float) -> None:
        super().__init__(params, {"lr": 0.0, "weight_decay": 0.0, "momentum": momentum, "trust": trust})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient, unless `found_inf` is 1, which torch's own obey too."""
        left_out = getattr(self, "found_inf", None)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                move = p.grad
                if p.ndim != 1:
                    move = move + group["weight_decay"] * p
                    size, pull = p.norm(), move.norm()
                    ratio = group["trust"] * size / pull
                    move = move * torch.where((size > 0) & (pull > 0), ratio, torch.ones_like(ratio))
                state = self.state[p]
                old = state.get("momentum", torch.zeros_like(p))
                new = old * group["momentum"] + move
                moved = p - group["lr"] * new
                state["momentum"] = new if left_out is None else torch.where(left_out > 0, old, new)
                p.copy_(moved if left_out is None else torch.where(left_out > 0, p, moved))


def set_rates(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Give every group its learning rate and weight decay for the step to come."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
        group["weight_decay"] = weight_decay if group["decay"] else 0.0


def move(optimizer: torch.optim.Optimizer, done: Tensor) -> None:
    """Do the optimizer's step and let the gradients go; where `done` is false on the device, nothing moves.

    The host does not wait to learn which: what torch made for its loss scaling keeps the moments and counts too.
    """
    optimizer.found_inf = (~done).float()  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def drop_frozen(optimizer: torch.optim.Optimizer, clock: Clock) -> None:
    """Take the gradient from groups that are still frozen, so that the optimizer passes them over altogether."""
    for group in optimizer.param_groups:
        if clock.epoch < group["frozen_epochs"]:
            for p in group["params"]:
                p.grad = None


@torch.no_grad()
def clip_gradients(optimizer: torch.optim.Optimizer, clip: Clip | None) -> Tensor:
    """Bound the gradients in place, and return their whole norm as it was before. []"""
    grads, modules = [], []
    for group in optimizer.param_groups:
        for p, module in zip(group["params"], group["modules"], strict=True):
            if p.grad is not None:
                grads.append(p.grad)
                modules.append(module)
    found = norms(grads)
    if clip is not None:
        bounded = clip.wholes(found, modules)
        torch._foreach_mul_(local(grads), [(clip.norm / (n + 1e-6)).clamp(max=1.0) for n in bounded])
    return torch.linalg.vector_norm(torch.stack(found))
