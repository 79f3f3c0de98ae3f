"""Parallelism: processes that share a batch, each with the same number of its images."""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from dinocli.core.distributed import mean_over_processes, size
from dinocli.core.errors import DinoError
from dinocli.engine.method import Method

Kind = Literal["ddp", "fsdp"]


@dataclass(frozen=True)
class Alone:
    """Single process without parallelism."""

    def wrap(self, method: Method) -> nn.Module:
        """Return the module to call instead of the method; wrapping may replace the method's parameters."""
        return method

    def adding(self, wrapped: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Return a context for a part's forward and backward pass; only in the last part are gradients averaged."""
        return contextlib.nullcontext()


@dataclass(frozen=True)
class DDP:
    """Model replicated in every process; gradients are averaged during the backward pass."""

    def wrap(self, method: Method) -> nn.Module:
        share_batch_norm(method)
        # Buffers need no broadcast: all processes compute them from the same values.
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # torch 2.15 renames it
            return DistributedDataParallel(method, broadcast_buffers=False)

    def adding(self, wrapped: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
        assert isinstance(wrapped, DistributedDataParallel)
        return contextlib.nullcontext() if last else wrapped.no_sync()


@dataclass(frozen=True)
class FSDP2:
    """Parameters, gradients and moments sharded over the processes; each block is gathered when it is used."""

    def wrap(self, method: Method) -> nn.Module:
        from torch.distributed.fsdp import fully_shard  # only here: it takes a third of torch's time

        share_batch_norm(method)
        # torch warns about outputs changed in place, which never happens here.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
        mesh = init_device_mesh(next(method.parameters()).device.type, (size(),))
        for module in method.units():
            # Roots are resharded too: without a backward pass, as in the teacher, a gathered root would keep the
            # weights of the previous step.
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
        return method

    @contextlib.contextmanager
    def adding(self, wrapped: nn.Module, last: bool) -> Any:
        from torch.distributed.fsdp import FSDPModule

        for module in wrapped.modules():
            if isinstance(module, FSDPModule):
                module.set_requires_gradient_sync(last, recurse=False)
        yield


Parallel = Alone | DDP | FSDP2


def parallel(kind: Kind) -> Parallel:
    """Return the parallelism of this run: the requested one, or none for a single process."""
    if size() == 1:
        return Alone()
    return DDP() if kind == "ddp" else FSDP2()


def share_batch_norm(module: nn.Module) -> None:
    """Synchronize every BatchNorm in a module over all processes; parameters and keys stay the same.

    Raises:
        DinoError: If a BatchNorm is of an unknown kind.
    """
    for name, child in module.named_children():
        if not isinstance(child, _BatchNorm):
            share_batch_norm(child)
        elif type(child) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            raise DinoError(
                f"{type(child).__name__} of this backbone cannot be synchronized across processes",
                "train it in one process",
            )
        elif child.running_mean is not None and child.running_mean.is_cuda:
            setattr(module, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))
        else:
            setattr(module, name, SharedBatchNorm.of(child))


class SharedBatchNorm(_BatchNorm):
    """BatchNorm over the images of all processes on a CPU, where torch's SyncBatchNorm does not run."""

    @classmethod
    def of(cls, other: _BatchNorm) -> SharedBatchNorm:
        """Create one with the same parameter and buffer tensors as another BatchNorm."""
        norm = cls(other.num_features, other.eps, other.momentum, other.affine, other.track_running_stats)
        for name, value in [*other.named_parameters(), *other.named_buffers()]:
            setattr(norm, name, value)
        return norm.train(other.training)

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept any number of dimensions."""

    def forward(self, values: Tensor) -> Tensor:  # [B, C, ...] -> [B, C, ...]
        if not self.training:
            return super().forward(values)
        dims = [0, *range(2, values.ndim)]
        shape = [1, -1, *[1] * (values.ndim - 2)]
        wide = values.float() if values.dtype in (torch.bfloat16, torch.float16) else values  # as torch's own does
        mean: Tensor = _Mean.apply(wide.mean(dims))
        centered = wide - mean.view(shape)
        variance: Tensor = _Mean.apply(centered.square().mean(dims))
        self._update_statistics(mean.detach(), variance.detach(), values.numel() // values.shape[1] * size())
        normalized = centered * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            normalized = normalized * self.weight.view(shape) + self.bias.view(shape)
        return normalized.to(values.dtype)

    @torch.no_grad()
    def _update_statistics(self, mean: Tensor, variance: Tensor, count: int) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        weight = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, weight)
        self.running_var.lerp_(variance * count / (count - 1), weight)  # unbiased, as torch stores it


class _Mean(torch.autograd.Function):
    """Mean over processes; its gradient is a mean too, because each process's value enters the losses of all."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return mean_over_processes(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return mean_over_processes(grads[0])
