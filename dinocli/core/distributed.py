"""Processes of a run: their launch, ranks and collectives. Only this file and engine/parallel.py use torch.distributed.

A run has one process, or those that torchrun or another launcher started. torch is imported only when needed, because
the command line asks this module which process may print.
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
_PATIENCE = timedelta(minutes=30)  # for a live process that does not arrive; a dead one is noticed at once


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
)


class Started(NamedTuple):
    """Place of this process among several that a launcher started.

    Attributes:
        launcher: Command that started them, or `torch.distributed` if only its variables are set.
        rank: Rank of this process; None if no variable has it.
        size: Number of processes; None if no variable has it.
        meets: True if the processes can connect: the variables are complete and include an address.
    """

    launcher: str
    rank: int | None
    size: int | None
    meets: bool


def started() -> Started | None:
    """Return the place of this process among several; None if it is alone."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        processes = int(os.environ["WORLD_SIZE"])
        return Started("torchrun", int(os.environ["RANK"]), processes, True) if processes > 1 else None
    found = []
    for launcher, rank_name, size_name in _VARIABLES:
        number, count = _integer(rank_name), _integer(size_name)
        if launcher == "srun" and (number is None or _integer("SLURM_STEP_NUM_TASKS") == 1 or _in_batch_script()):
            continue  # a batch script and an interactive shell are one process of a job that may have many tasks
        if (count or 0) > 1 or ((number or 0) > 0 and count is None):
            address = os.environ.get("MASTER_ADDR") and _integer("MASTER_PORT")
            meets = number is not None and count is not None and number < count and bool(address)
            found.append(Started(launcher, number, count, meets))
    # A batch script may export WORLD_SIZE alone and leave the rank to srun's variable.
    return max(found, key=lambda place: (place.meets, place.size is not None), default=None)


def unused_tasks() -> int:
    """Return the number of tasks of a SLURM job whose batch script runs this command once; 1 outside such jobs."""
    return (_integer("SLURM_NTASKS") or 1) if _in_batch_script() else 1


def _in_batch_script() -> bool:
    # SLURM gives the script rank 0 of all tasks, as srun gives its first task; only srun sets a step.
    in_step = {"SLURM_STEP_ID", "SLURM_STEPID"} & set(os.environ) or _integer("SLURM_PROCID")
    return "SLURM_JOB_NODELIST" in os.environ and not in_step


def _integer(name: str) -> int | None:
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else None


def check_launch(command: str) -> None:
    """Check that processes of a launcher other than torchrun can connect, so that none trains alone.

    Raises:
        DinoError: If an address, the rank or the number of processes is missing.
    """
    found = started()
    if found is None or found.meets:
        return
    count = str(found.size or "N")
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if found.launcher == "torch.distributed":
        came = [f"{name}={os.environ[name]}" for name in ("RANK", "WORLD_SIZE") if name in os.environ]
        fault = f"without {' and '.join(missing)}" if missing else "is incomplete"
        if len(came) == 2 and (found.rank or 0) >= (found.size or 1):
            fault = "is out of range"
        raise DinoError(
            f"{' '.join(came)} {fault}: each process would run alone",
            f"torchrun --nproc-per-node {count} -m dinocli {command} ...; or alone: env -u RANK -u WORLD_SIZE "
            f"dino {command} ...",
        )
    ways = {
        "srun": "export MASTER_ADDR=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1) MASTER_PORT=29500 "
        f"before srun; or srun --ntasks=1 dino {command} ..." + (f" --gpus {count}" if command == "pretrain" else ""),
        "mpirun": "export MASTER_ADDR=HOST MASTER_PORT=29500 to all (mpirun -x with Open MPI); or torchrun "
        f"--nproc-per-node {count} -m dinocli {command} ...",
    }
    lacking = " and ".join(missing) or "the rank or the number of processes"
    raise DinoError(
        f"{found.launcher} started {found.size or 'several'} processes without {lacking}: each would run alone",
        ways.get(found.launcher, f"export MASTER_ADDR=HOST MASTER_PORT=29500 before {found.launcher}"),
    )


def size() -> int:
    """Return the number of processes of the run."""
    found = started()
    return found.size if found and found.meets and found.size else 1


def rank() -> int:
    """Return the rank of this process in the run; rank 0 prints and writes."""
    found = started()
    return found.rank if found and found.meets and found.rank else 0


def local_size() -> int:
    """Return the number of processes of the run on this machine."""
    return (_integer("LOCAL_WORLD_SIZE") or 1) if size() > 1 else 1


def local_rank() -> int:
    """Return the rank of this process on its machine, which is also the index of its CUDA device."""
    return (_integer("LOCAL_RANK") or 0) if size() > 1 else 0


def begin() -> None:
    """Connect to the other processes of the run."""
    if size() == 1:
        return
    end_with(os.getppid())  # torchrun, which may be killed; an orphan would keep the run folder and the device
    import torch
    from torch import distributed

    address = f"env://?rank={rank()}&world_size={size()}"
    store, number, count = next(distributed.rendezvous(address, timeout=_PATIENCE))  # type: ignore[attr-defined]
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        _find_local_places(store, number, count)
    cuda = torch.cuda.is_available()
    if cuda and local_rank() < torch.cuda.device_count():
        torch.cuda.set_device(local_rank())
    # When torchrun restarts processes, it keeps its store and with it the addresses of dead ones. All processes have
    # the same restart count only on a single machine.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if local_size() == size() else "0"
    store = distributed.PrefixStore(f"dinocli/{attempt}", store)  # type: ignore[attr-defined]
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    distributed.init_process_group(backend, store=store, rank=number, world_size=count, timeout=_PATIENCE)


def _find_local_places(store: Any, number: int, count: int) -> None:
    """Set the local rank and size as torchrun does, because not every launcher sets them.

    If each task is bound to one GPU, it sees that GPU as device 0. So the ranks of such tasks are counted as if each
    were on its own machine.
    """
    import socket

    mine = f"{socket.gethostname()} {os.environ.get('CUDA_VISIBLE_DEVICES', '')}"
    store.set(f"dinocli/place/{number}", mine)
    places = [store.get(f"dinocli/place/{i}").decode() for i in range(count)]
    hosts = [place.split(" ")[0] for place in places]
    os.environ["LOCAL_RANK"] = str(places[:number].count(mine))
    os.environ["LOCAL_WORLD_SIZE"] = str(hosts.count(hosts[number]))


def end() -> None:
    """Leave the other processes once all have arrived here."""
    if size() > 1 and _together():
        from torch import distributed

        any_of(False)
        distributed.destroy_process_group()


def _together() -> bool:
    from torch import distributed

    return distributed.is_available() and distributed.is_initialized()


def launch(processes: int) -> int:
    """Run this command in `processes` processes on this machine, as torchrun does; return the exit code."""
    import logging
    from uuid import uuid4

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The failed process has printed the reason, or another process that it is gone.
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

    Linux does so itself, and ends a stopped process too. On other systems, a thread checks twice a second.

    Args:
        parent: Process id of the parent when it started this process.
        by_system: True if Linux may do it. Linux watches the thread that started this process, so that thread must
            live as long as its process.
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
    """Return whether this process is the first of the run to fail, and so the one to report the reason."""
    if size() == 1:
        return True
    from torch import distributed

    if not _together():
        return rank() == 0
    try:
        return distributed.distributed_c10d._get_default_store().add("failed", 1) == 1
    except RuntimeError:  # the process that hosts the store is gone
        return rank() == 0


def lost(error: BaseException) -> bool:
    """Return whether an error means that another process is gone."""
    if size() == 1:
        return False
    from torch import distributed

    words = str(error)
    return isinstance(error, distributed.DistError) or (
        isinstance(error, RuntimeError) and ("gloo" in words or "Connection closed by peer" in words)
    )


def any_of(*flags: bool) -> list[bool]:
    """Return, for each flag, whether it is set in any process. The host waits for the others, the device does not."""
    if not _together():
        return list(flags)
    import torch
    from torch import distributed

    found = torch.tensor(flags, dtype=torch.int32, device="cpu")
    distributed.all_reduce(found, distributed.ReduceOp.MAX)
    return [bool(flag) for flag in found.tolist()]


def gathered(value: Value) -> list[Value]:
    """Return the values of all processes, by rank, in every process; they are exchanged as pickles."""
    if not _together():
        return [value]
    from torch import distributed

    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def from_first(value: Value) -> Value:
    """Return the value of the first process."""
    if not _together():
        return value
    from torch import distributed

    values: list[Any] = [value]
    distributed.broadcast_object_list(values, src=0)
    return values[0]


def mean_over_processes(values: Tensor) -> Tensor:
    """Return the mean of the values over all processes; in a run of one process, the values unchanged.

    Every process gets the same result, and all must have the same number of samples behind their values.
    """
    if not _together():
        return values
    from torch import distributed

    total = values.clone()
    distributed.all_reduce(total)
    return total / distributed.get_world_size()


def logsumexp_over_processes(values: Tensor) -> Tensor:
    """Return the logarithm of the sum, over all processes, of the exponentials of their values.

    From each process's `logsumexp` over its own samples, this computes the `logsumexp` over the samples of all. In a
    run of one process, the values are returned unchanged.
    """
    if not _together():
        return values
    import torch
    from torch import distributed

    top = values.clone()
    distributed.all_reduce(top, distributed.ReduceOp.MAX)
    top.clamp_(min=torch.finfo(top.dtype).min)  # -inf, from no samples anywhere, minus itself is NaN
    total = (values - top).exp()
    distributed.all_reduce(total)
    return total.log() + top


def all_of(done: Tensor) -> Tensor:
    """Return whether a flag on the device is set in all processes; the host does not wait for it. [], bool"""
    if not _together():
        return done
    from torch import distributed

    found = done.int()
    distributed.all_reduce(found, distributed.ReduceOp.MIN)
    return found.bool()


# Sharded tensors, as in FSDP2: every process holds a part of each.


def in_shards(tensors: Sequence[Tensor]) -> bool:
    """Return whether any of the tensors is sharded."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(tensor, DTensor) for tensor in tensors)


def local(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return this process's part of each tensor: its own shard, or all of a tensor that is not sharded."""
    from torch.distributed.tensor import DTensor

    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the norm of each tensor, over all its shards."""
    import torch

    found = torch._foreach_norm(local(tensors))
    if not in_shards(tensors):
        return list(found)
    squares = torch.stack(found).square()
    return list((mean_over_processes(squares) * size()).sqrt().unbind())


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
