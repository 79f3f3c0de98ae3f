"""Device and precision to compute with, and the number of processes that decode images."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch

from dinocli.core.distributed import local_rank, local_size, size
from dinocli.core.errors import DinoError
from dinocli.core.resources import cores

Precision = Literal["float32", "bfloat16"]


def pick_device(name: str) -> torch.device:
    """Return the device with a name; `auto` is the first available of CUDA, MPS and CPU.

    With several processes, each gets the CUDA device of its local rank.

    Raises:
        DinoError: If the name is invalid or the device is not available.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        # MPS has no communication between processes.
        name = next(kind for kind, present in there.items() if present and (size() == 1 or kind != "mps"))
    try:
        device = torch.device(name)
        if device.type == "cuda" and size() > 1:
            device = torch.device("cuda", local_rank())
    except RuntimeError:
        device = None
    if device is None or device.type not in there:
        raise DinoError(f"--device {name!r} is not a device; expected auto, cpu, cuda, cuda:1 or mps", "--device auto")
    count = torch.cuda.device_count()
    if not there[device.type] or (device.type == "cuda" and (device.index or 0) >= count):
        has = (
            f"{count} CUDA devices" if device.type == "cuda" and count else ", ".join(k for k, p in there.items() if p)
        )
        raise DinoError(
            f"--device {name} is not available: torch {torch.__version__} finds {has} on this machine", "--device auto"
        )
    return device


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """Return the autocast context for a precision; without native support, products stay float32 like the weights."""
    if precision == "bfloat16" and has_bfloat16(device):
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


def has_bfloat16(device: torch.device) -> bool:
    """Return whether a device multiplies bfloat16 natively; emulation is slower than float32."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        has: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # in newer torch only
        return any(has.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return False


def why_not_compiled(device: torch.device) -> str | None:
    """Try torch.compile on a device, and return its error in one line; None if it works."""
    try:
        torch.compile(lambda x: (x * 2).relu())(torch.ones(8, device=device))
    except Exception as error:  # no compiler, no Triton, an unknown Python: any error counts
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return None


def keep_freed_memory() -> None:
    """Make the C library keep the memory that a CPU step frees for the next step, which needs as much again.

    Returning it to the system and getting it back page by page took 4 % of a step in float32 and 7 % in bfloat16. If
    the library is not glibc, nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        library = ctypes.CDLL(None)
        library.mallopt(_MMAP_THRESHOLD, 32 * 2**20)  # the largest value it accepts
        library.mallopt(_TRIM_THRESHOLD, 2**31 - 1)


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h


def default_workers(device: torch.device) -> int:
    """Return the number of processes that decode images: one per core with a GPU; one per four if the CPU trains.

    Several processes of the run on this machine share the cores.
    """
    each = max(1, cores() // local_size())
    return min(16, each) if device.type != "cpu" else max(1, min(4, each // 4))


def peak_memory(device: torch.device) -> int:
    """Return the peak memory use in bytes: of the device, or of this process if the device is the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def exactly(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context without autocast, for values that must not be rounded."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()  # this device has no autocast
