"""Every question about other processes; with engine/parallel.py the one file that says torch.distributed.

A run is of one process, or of those that torchrun started. torch is imported where it is needed: the command line asks
here who may speak.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

Value = TypeVar("Value")

_PR_SET_PDEATHSIG = 1  # of Linux's prctl.h
_PATIENCE = timedelta(minutes=30)  # for a process that is alive and does not come; one that dies is noticed at once


def size() -> int:
    """Processes of the run."""
    return _told("WORLD_SIZE", 1)


def rank() -> int:
    """Number of this process in the run; 0 speaks and writes."""
    return _told("RANK", 0)


def local_size() -> int:
    """Processes of the run on this machine."""
    return _told("LOCAL_WORLD_SIZE", 1)


def local_rank() -> int:
    """Number of this process on its machine, and of its CUDA device."""
    return _told("LOCAL_RANK", 0)


def _told(name: str, alone: int) -> int:
    # Clusters set some of these names for whole containers; torchrun's own mark says that they are about this process.
    return int(os.environ[name]) if "TORCHELASTIC_RUN_ID" in os.environ else alone


def begin() -> None:
    """Meet the other processes of the run."""
    if size() == 1:
        return
    end_with(os.getppid())  # torchrun, which may be killed; alone a process would keep the run folder and the device
    import torch
    from torch import distributed

    cuda = torch.cuda.is_available()
    if cuda and local_rank() < torch.cuda.device_count():
        torch.cuda.set_device(local_rank())
    store, number, count = next(distributed.rendezvous("env://", timeout=_PATIENCE))  # type: ignore[attr-defined]
    # torchrun keeps its store when it starts processes again, and with it the addresses of those that are gone. Only on
    # one machine do all processes count the starts alike.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if local_size() == size() else "0"
    store = distributed.PrefixStore(f"dinocli/{attempt}", store)  # type: ignore[attr-defined]
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    distributed.init_process_group(backend, store=store, rank=number, world_size=count, timeout=_PATIENCE)


def end() -> None:
    """Part from the others, once all have come here."""
    if size() > 1 and _together():
        from torch import distributed

        any_of(False)
        distributed.destroy_process_group()


def _together() -> bool:
    from torch import distributed

    return distributed.is_available() and distributed.is_initialized()


def launch(processes: int) -> int:
    """Run this process's command in so many processes of this machine, as torchrun does; the exit code."""
    import logging
    from uuid import uuid4

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Whichever process failed has said why, or another one that it is gone.
    logging.disable(logging.ERROR)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    config = LaunchConfig(
        1, 1, processes, run_id=uuid4().hex, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0,
        signals_to_handle="SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
    )  # fmt: skip
    try:
        elastic_launch(config, sys.executable)("-m", "dinocli", *sys.argv[1:])
    except ChildFailedError:
        return 1
    except SignalException as stopped:  # they were told, and have come to their end
        return 0 if stopped.sigval in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1) else 1
    return 0


def end_with(parent: int, *, by_system: bool = True) -> None:
    """End this process as soon as the one that started it is gone, which may have been killed.

    Linux does so itself, and ends a stopped process too. Elsewhere a thread looks twice a second.

    Args:
        parent: Process id that the parent had when it started this process.
        by_system: Whether Linux may do it. It counts the end of the thread that started this process, which therefore
            must be one that lives as long as its process.
    """
    if by_system and sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError, TypeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # gone before the system was asked
        os._exit(1)
    threading.Thread(target=_wait_for_end_of, args=(parent,), daemon=True).start()


def _wait_for_end_of(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def first_to_fail() -> bool:
    """Whether no other process of the run has failed before this one, which is then the one to say why."""
    if size() == 1:
        return True
    from torch import distributed

    if not _together():
        return rank() == 0
    try:
        return distributed.distributed_c10d._get_default_store().add("failed", 1) == 1
    except RuntimeError:  # who keeps the store is gone
        return rank() == 0


def lost(error: BaseException) -> bool:
    """Whether an error says that another process is gone."""
    if size() == 1:
        return False
    from torch import distributed

    words = str(error)
    return isinstance(error, distributed.DistError) or (
        isinstance(error, RuntimeError) and ("gloo" in words or "Connection closed by peer" in words)
    )


def any_of(*flags: bool) -> list[bool]:
    """For each flag, whether it is set in any process. The host waits for the others, the device for nothing."""
    if not _together():
        return list(flags)
    import torch
    from torch import distributed

    found = torch.tensor(flags, dtype=torch.int32, device="cpu")
    distributed.all_reduce(found, distributed.ReduceOp.MAX)
    return [bool(flag) for flag in found.tolist()]


def gathered(value: Value) -> list[Value]:
    """What each process holds, by its number, in all of them; it travels as a pickle between them."""
    if not _together():
        return [value]
    from torch import distributed

    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def from_first(value: Value) -> Value:
    """What the first process holds."""
    if not _together():
        return value
    from torch import distributed

    values: list[Any] = [value]
    distributed.broadcast_object_list(values, src=0)
    return values[0]


def mean_over_processes(values: Tensor) -> Tensor:
    """The mean of what each process of the run holds; in a run of one process, the values as they are.

    Every process gets the same numbers, and each must have as many samples behind its own as the others.
    """
    if not _together():
        return values
    from torch import distributed

    total = values.clone()
    distributed.all_reduce(total)
    return total / distributed.get_world_size()


def logsumexp_over_processes(values: Tensor) -> Tensor:
    """The logarithm of the sum, over the processes of the run, of the exponentials of what each holds.

    Of what each process's `logsumexp` found for its own samples it makes what that would find for the samples of all.
    In a run of one process, the values as they are.
    """
    if not _together():
        return values
    import torch
    from torch import distributed

    top = values.clone()
    distributed.all_reduce(top, distributed.ReduceOp.MAX)
    top.clamp_(min=torch.finfo(top.dtype).min)  # -inf, of no samples anywhere, has no difference to itself
    total = (values - top).exp()
    distributed.all_reduce(total)
    return total.log() + top


def all_of(done: Tensor) -> Tensor:
    """Whether a truth on the device holds in all processes; the host does not wait for it. [], bool"""
    if not _together():
        return done
    from torch import distributed

    found = done.int()
    distributed.all_reduce(found, distributed.ReduceOp.MIN)
    return found.bool()


# Tensors that lie in shards, a part of each in every process, as FSDP2 holds them.


def in_shards(tensors: Sequence[Tensor]) -> bool:
    """Whether any of them lies in shards."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(tensor, DTensor) for tensor in tensors)


def local(tensors: Sequence[Tensor]) -> list[Tensor]:
    """What this process holds of each: all of it, or of one in shards its own."""
    from torch.distributed.tensor import DTensor

    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The norm of each, over all its shards."""
    import torch

    found = torch._foreach_norm(local(tensors))
    if not in_shards(tensors):
        return list(found)
    squares = torch.stack(found).square()
    return list((mean_over_processes(squares) * size()).sqrt().unbind())


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; one in shards is gathered in the host's memory, and then every process must ask."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def placed_as(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor on the device of another, and in shards where that one is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    tensor = tensor.to(like.device)
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
