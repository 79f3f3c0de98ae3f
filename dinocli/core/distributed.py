"""Processes of a run: their launch, ranks and collectives. Only this file and engine/parallel.py use torch.distributed.

A run has one process, or those that torchrun or another launcher started. torch is imported only on use, because the
command line calls `rank` before it needs torch, to decide which process prints.
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
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from dinocli.core.errors import DinoError

if TYPE_CHECKING:
    from torch import Tensor

Value = TypeVar("Value")

_PR_SET_PDEATHSIG = 1  # from Linux's prctl.h
_TIMEOUT = timedelta(minutes=30)  # for a live process that is late; a dead one is noticed at once


# Variables with the rank and the number of processes, by launcher.
_VARIABLES = (
    ("torch.distributed", "RANK", "WORLD_SIZE"),
    ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    ("srun", "SLURM_PROCID", "SLURM_NTASKS"),
    ("mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("mpirun", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
    ("mpirun", "PMI_RANK", "PMI_SIZE"),
    ("mpirun", "PMIX_RANK", "PMIX_SIZE"),
    ("jsrun", "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE"),
    ("flux run", "FLUX_TASK_RANK", "FLUX_JOB_SIZE"),
    ("submitit", "SUBMITIT_LOCAL_GLOBALID", "SUBMITIT_LOCAL_NTASKS"),  # on this machine; on a cluster it uses srun
)


class Started(NamedTuple):
    """Launcher, rank and number of the processes of this run, as environment variables state them.

    Attributes:
        launcher: Command that started them, or `torch.distributed` if only its variables are set.
        rank: Rank of this process; None if no variable has it.
        size: Number of processes; None if no variable has it.
        meets: True if the processes can connect: rank and size are set and valid, and so are address and port.
    """

    launcher: str
    rank: int | None
    size: int | None
    meets: bool


def started() -> Started | None:
    """Read the launcher's variables of this process; return None if it is the only process of its run."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        processes = int(os.environ["WORLD_SIZE"])
        return Started("torchrun", int(os.environ["RANK"]), processes, True) if processes > 1 else None
    candidates = []
    for launcher, rank_name, size_name in _VARIABLES:
        number, count = _read_integer(rank_name), _read_integer(size_name)
        alone = _read_integer("SLURM_STEP_NUM_TASKS") == 1 or _is_in_batch_script()
        if launcher == "srun" and (number is None or alone):
            continue  # a batch script or an interactive shell is one process, even if its job has many tasks
        if (count or 0) > 1 or ((number or 0) > 0 and count is None):
            address = os.environ.get("MASTER_ADDR") and _read_integer("MASTER_PORT")
            meets = number is not None and count is not None and number < count and bool(address)
            candidates.append(Started(launcher, number, count, meets))
    # A batch script may export only WORLD_SIZE and leave the rank to srun's variable.
    return max(candidates, key=lambda each: (each.meets, each.size is not None), default=None)


def unused_tasks() -> int:
    """Return the number of tasks of a SLURM job whose batch script runs this command without srun; 1 otherwise."""
    return (_read_integer("SLURM_NTASKS") or 1) if _is_in_batch_script() else 1


def _is_in_batch_script() -> bool:
    # A batch script has rank 0 and the number of all tasks, like the first task of srun; only srun sets a step.
    in_step = {"SLURM_STEP_ID", "SLURM_STEPID"} & set(os.environ) or _read_integer("SLURM_PROCID")
    return "SLURM_JOB_NODELIST" in os.environ and not in_step


def _read_integer(name: str) -> int | None:
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else None


def check_launch(command: str) -> None:
    """Check that the processes of a launcher can connect; otherwise each would train alone.

    Raises:
        DinoError: If an address, the rank or the number of processes is missing.
    """
    place = started()
    if place is None or place.meets:
        return
    count = str(place.size or "N")
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if place.launcher == "torch.distributed":
        present = [f"{name}={os.environ[name]}" for name in ("RANK", "WORLD_SIZE") if name in os.environ]
        problem = f"without {' and '.join(missing)}" if missing else "is incomplete"
        if len(present) == 2 and (place.rank or 0) >= (place.size or 1):
            problem = "is out of range"
        raise DinoError(
            f"{' '.join(present)} {problem}: each process would run alone",
            f"torchrun --nproc-per-node {count} -m dinocli {command} ...; or alone: env -u RANK -u WORLD_SIZE "
            f"dino {command} ...",
        )
    export = "export MASTER_ADDR=HOST MASTER_PORT=29500"
    torchrun = f"torchrun --nproc-per-node {count} -m dinocli {command} ..."
    hints = {
        "srun": f"dino slurm {command} ... prints a job script with torchrun; or export MASTER_ADDR=$(scontrol show "
        "hostnames $SLURM_JOB_NODELIST | head -n 1) MASTER_PORT=29500 before srun; or srun --ntasks=1 "
        f"dino {command} ..." + (f" --gpus {count}" if command == "pretrain" else ""),
        "mpirun": f"{export} to all (mpirun -x with Open MPI); or {torchrun}",
    }
    absent = " and ".join(missing) or "the rank or the number of processes"
    raise DinoError(
        f"{place.launcher} started {place.size or 'several'} processes without {absent}: each would run alone",
        hints.get(place.launcher, f"{export} before {place.launcher}; or {torchrun}"),
    )


def refuse_several(place: Started, command: str) -> None:
    """Refuse a launch of a command that runs in one process: all processes would write the same files.

    Raises:
        DinoError: Always.
    """
    number = place.size or "several"
    if place.launcher == "torch.distributed":
        present = " ".join(f"{name}={os.environ[name]}" for name in ("RANK", "WORLD_SIZE") if name in os.environ)
        raise DinoError(
            f"dino {command} runs in one process; {present} announces {number}",
            f"env -u RANK -u WORLD_SIZE dino {command} ... in one of them; only pretrain and extract run in several, "
            "with torchrun",
        )
    raise DinoError(
        f"dino {command} runs in one process; {place.launcher} started {number}",
        f"run it without {place.launcher}: dino {command} ...",
    )


def size() -> int:
    """Return the number of processes of the run."""
    place = started()
    return place.size if place and place.meets and place.size else 1


def rank() -> int:
    """Return the rank of this process in the run; rank 0 prints and writes."""
    place = started()
    return place.rank if place and place.meets and place.rank else 0


def local_size() -> int:
    """Return the number of processes of the run on this machine."""
    return (_read_integer("LOCAL_WORLD_SIZE") or 1) if size() > 1 else 1


def local_rank() -> int:
    """Return the rank of this process on its machine, which is also the index of its CUDA device."""
    return (_read_integer("LOCAL_RANK") or 0) if size() > 1 else 0


def begin() -> None:
    """Connect to the other processes of the run."""
    if size() == 1:
        return
    end_with(os.getppid())  # torchrun may be killed, and an orphan would keep the run folder locked and the device busy
    import torch
    from torch import distributed

    address = f"env://?rank={rank()}&world_size={size()}"
    store, number, count = next(distributed.rendezvous(address, timeout=_TIMEOUT))  # type: ignore[attr-defined]
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        _set_local_ranks(store, number, count)
    cuda = torch.cuda.is_available()
    if cuda and local_rank() < torch.cuda.device_count():
        torch.cuda.set_device(local_rank())
    # torchrun keeps its store when it restarts processes, and the store still has the addresses of dead ones. Only on
    # a single machine do all processes have the same restart count.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if local_size() == size() else "0"
    store = distributed.PrefixStore(f"dinocli/{attempt}", store)  # type: ignore[attr-defined]
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    distributed.init_process_group(backend, store=store, rank=number, world_size=count, timeout=_TIMEOUT)


def _set_local_ranks(store: Any, number: int, count: int) -> None:
    """Set the local rank and size as torchrun does, because not every launcher sets them.

    A task that is bound to one GPU sees it as device 0 and needs local rank 0. So ranks are counted among the tasks
    of a machine that have the same visible devices.
    """
    import socket

    mine = f"{socket.gethostname()} {os.environ.get('CUDA_VISIBLE_DEVICES', '')}"
    store.set(f"dinocli/place/{number}", mine)
    places = [store.get(f"dinocli/place/{i}").decode() for i in range(count)]
    hosts = [place.split(" ")[0] for place in places]
    os.environ["LOCAL_RANK"] = str(places[:number].count(mine))
    os.environ["LOCAL_WORLD_SIZE"] = str(hosts.count(hosts[number]))


def end() -> None:
    """Wait until all processes have arrived here, then disconnect from them."""
    if size() > 1 and _is_connected():
        from torch import distributed

        any_of(False)
        distributed.destroy_process_group()


def _is_connected() -> bool:
    from torch import distributed

    return distributed.is_available() and distributed.is_initialized()


def launch(processes: int) -> int:
    """Run this command in `processes` processes on this machine, as torchrun does; return the exit code."""
    import logging
    from uuid import uuid4

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Silence torchrun's report: the failed process has printed its error, or another has printed that it is gone.
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
    except SignalException as stopped:  # the processes got the signal and have ended
        return 0 if stopped.sigval in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1) else 1
    return 0


def end_with(parent: int, *, by_system: bool = True) -> None:
    """End this process as soon as its parent is gone, even if the parent was killed.

    A thread checks twice a second. On Linux the kernel also does so, at once and even if this process is stopped.

    Args:
        parent: Process id of the parent when it started this process.
        by_system: True if the Linux kernel may do so. It ends this process together with the thread that started it,
            so that thread must live as long as the parent.
    """
    if by_system and sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError, TypeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # gone before prctl was called
        os._exit(1)
    threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()


def _exit_after(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def first_to_fail() -> bool:
    """Return True if this process is the first of the run to fail, and therefore reports the error."""
    if size() == 1:
        return True
    from torch import distributed

    if not _is_connected():
        return rank() == 0
    try:
        return distributed.distributed_c10d._get_default_store().add("failed", 1) == 1
    except RuntimeError:  # the process that hosts the store is gone
        return rank() == 0


def lost(error: BaseException) -> bool:
    """Return True if an error means that another process is gone."""
    if size() == 1:
        return False
    from torch import distributed

    message = str(error)
    return isinstance(error, distributed.DistError) or (
        isinstance(error, RuntimeError) and ("gloo" in message or "Connection closed by peer" in message)
    )


def any_of(*flags: bool) -> list[bool]:
    """Return True for each flag that is set in any process. The host waits for the others, the device does not."""
    if not _is_connected():
        return list(flags)
    import torch
    from torch import distributed

    reduced = torch.tensor(flags, dtype=torch.int32, device="cpu")
    distributed.all_reduce(reduced, distributed.ReduceOp.MAX)
    return [bool(flag) for flag in reduced.tolist()]


def gathered(value: Value) -> list[Value]:
    """Return the values of all processes, in order of rank, in every process; they are exchanged as pickles."""
    if not _is_connected():
        return [value]
    from torch import distributed

    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def from_first(value: Value) -> Value:
    """Return the value of the first process."""
    if not _is_connected():
        return value
    from torch import distributed

    values: list[Any] = [value]
    distributed.broadcast_object_list(values, src=0)
    return values[0]


def mean_over_processes(values: Tensor) -> Tensor:
    """Return the mean of the values over all processes; in a run of one process, the values unchanged.

    Every process gets the same result. If values are means over samples, all processes must have equally many samples.
    """
    if not _is_connected():
        return values
    from torch import distributed

    total = values.clone()
    distributed.all_reduce(total)
    return total / distributed.get_world_size()


def joint_mean(values: Tensor) -> Tensor:
    """Return the mean of the values over all processes, with the gradient of this process's own values.

    If every process computes the same function of this mean, the average of their gradients is the gradient of the
    function over all samples: no second exchange is needed in the backward pass.
    """
    return with_gradient_of(values, mean_over_processes(values.detach()))


def with_gradient_of(values: Tensor, mean: Tensor) -> Tensor:
    """Return `mean`, unchanged to the bit, with a gradient that goes to `values` as if they were the mean."""
    return mean + (values - values.detach())


def logsumexp_over_processes(values: Tensor) -> Tensor:
    """Return the elementwise `logsumexp` of the values of all processes.

    If the values are each process's `logsumexp` over its own samples, the result is the one over all samples. In a run
    of one process, the values are returned unchanged.
    """
    if not _is_connected():
        return values
    import torch
    from torch import distributed

    maximum = values.clone()
    distributed.all_reduce(maximum, distributed.ReduceOp.MAX)
    maximum.clamp_(min=torch.finfo(maximum.dtype).min)  # without samples it is -inf, and -inf minus itself is NaN
    total = (values - maximum).exp()
    distributed.all_reduce(total)
    return total.log() + maximum


def all_of(done: Tensor) -> Tensor:
    """Return True if a flag on the device is set in all processes; the host does not wait for it. [], bool"""
    if not _is_connected():
        return done
    from torch import distributed

    reduced = done.int()
    distributed.all_reduce(reduced, distributed.ReduceOp.MIN)
    return reduced.bool()


# Sharded tensors, as in FSDP2: every process holds one shard of each.


def in_shards(tensors: Sequence[Tensor]) -> bool:
    """Return True if any of the tensors is sharded."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(tensor, DTensor) for tensor in tensors)


def local(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return this process's shard of each tensor, or the full tensor if it is not sharded."""
    from torch.distributed.tensor import DTensor

    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """Return the norm of each of n tensors, over all its shards. [n]"""
    import torch

    local_norms = torch.stack(torch._foreach_norm(local(tensors)))
    if not in_shards(tensors):
        return local_norms
    return (mean_over_processes(local_norms.square()) * size()).sqrt()


def whole(tensor: Tensor) -> Tensor:
    """Return the full tensor. A sharded one is gathered in host memory, and every process must call this."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def placed_as(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a full tensor on the device of `like`, and sharded if `like` is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    tensor = tensor.to(like.device)
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
