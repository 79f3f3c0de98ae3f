"""How the processes of a run share the work on a batch; each has as many of its images as the others."""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from dinocli.distributed import mean_over_processes, size
from dinocli.engine.method import Method
from dinocli.errors import DinoError

Kind = Literal["ddp", "fsdp"]


@dataclass(frozen=True)
class Alone:
    """One process does it all."""

    def wrap(self, method: Method) -> nn.Module:
        """What is called in place of the method; its parameters may be others from here on."""
        return method

    def adding(self, wrapped: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Around forward and backward of a part of a step; after the last, gradients are means over processes."""
        return contextlib.nullcontext()


@dataclass(frozen=True)
class DDP:
    """Every process holds the whole of everything, and the gradients are averaged while they are worked out."""

    def wrap(self, method: Method) -> nn.Module:
        share_batch_norm(method)
        # Buffers are the same in all processes by what they are made of: none has to be sent.
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # torch 2.15 has another name for it
            return DistributedDataParallel(method, broadcast_buffers=False)

    def adding(self, wrapped: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
        assert isinstance(wrapped, DistributedDataParallel)
        return contextlib.nullcontext() if last else wrapped.no_sync()


@dataclass(frozen=True)
class FSDP2:
    """Every process holds a shard of each parameter, its gradient and moments, and gathers a block when it is used."""

    def wrap(self, method: Method) -> nn.Module:
        share_batch_norm(method)
        # It warns of outputs changed in place, which nobody does here.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
        mesh = init_device_mesh(next(method.parameters()).device.type, (size(),))
        for module in method.units():
            # Roots too: what stays gathered would be that of the step before where no backward comes.
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
        return method

    @contextlib.contextmanager
    def adding(self, wrapped: nn.Module, last: bool) -> Any:
        for module in wrapped.modules():
            if isinstance(module, FSDPModule):
                module.set_requires_gradient_sync(last, recurse=False)
        yield


Parallel = Alone | DDP | FSDP2


def parallel(kind: Kind) -> Parallel:
    """How this run's processes share the work: as asked for, or not at all where there is one."""
    if size() == 1:
        return Alone()
    return DDP() if kind == "ddp" else FSDP2()


def share_batch_norm(module: nn.Module) -> None:
    """Let every BatchNorm in a module work over the images of all processes; parameters and keys stay as they are.

    Raises:
        DinoError: It has one of a kind that is unknown here.
    """
    for name, child in module.named_children():
        if not isinstance(child, _BatchNorm):
            share_batch_norm(child)
        elif type(child) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            raise DinoError(
                f"{type(child).__name__} of this backbone cannot be shared among processes", "train it in one process"
            )
        elif child.running_mean is not None and child.running_mean.is_cuda:
            setattr(module, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))
        else:
            setattr(module, name, SharedBatchNorm.of(child))


class SharedBatchNorm(_BatchNorm):
    """BatchNorm over the images of all processes, on a CPU, for which torch has none."""

    @classmethod
    def of(cls, other: _BatchNorm) -> SharedBatchNorm:
        """One with the parameters and statistics of another, which it shares with it."""
        made = cls(other.num_features, other.eps, other.momentum, other.affine, other.track_running_stats)
        for name, value in [*other.named_parameters(), *other.named_buffers()]:
            setattr(made, name, value)
        return made.train(other.training)

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions will do."""

    def forward(self, values: Tensor) -> Tensor:  # [B, C, ...] -> [B, C, ...]
        if not self.training:
            return super().forward(values)
        dims = [0, *range(2, values.ndim)]
        shape = [1, -1, *[1] * (values.ndim - 2)]
        mean: Tensor = _Mean.apply(values.mean(dims))
        centered = values - mean.view(shape)
        variance: Tensor = _Mean.apply(centered.square().mean(dims))
        self._remember(mean.detach(), variance.detach(), values.numel() // values.shape[1] * size())
        normal = centered * (variance + self.eps).rsqrt().view(shape)
        return normal * self.weight.view(shape) + self.bias.view(shape) if self.affine else normal

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor, count: int) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        pace = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, pace)
        self.running_var.lerp_(variance * count / (count - 1), pace)


class _Mean(torch.autograd.Function):
    """The mean over processes; what one process adds to it, it adds to the losses of all."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return mean_over_processes(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return mean_over_processes(grads[0])
