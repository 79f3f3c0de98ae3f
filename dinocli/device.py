"""Which device to compute on, how precisely, and with how many processes beside it."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Mapping
from typing import Any

import torch

from dinocli.distributed import local_rank, local_size, size
from dinocli.errors import DinoError
from dinocli.resources import cores


def pick_device(name: str) -> torch.device:
    """The device of a name; `auto` is the first of CUDA, MPS and CPU that is there.

    Of several processes each has a CUDA device of its own, the one of its number on this machine.

    Raises:
        DinoError: The name is none, or the device is not there.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        # Metal has no way between processes.
        name = next(kind for kind, present in there.items() if present and (size() == 1 or kind != "mps"))
    try:
        device = torch.device(name)
        if device.type == "cuda" and size() > 1:
            device = torch.device("cuda", local_rank())
    except RuntimeError:
        device = None
    if device is None or device.type not in there:
        raise DinoError(f"a device was wanted (auto, cpu, cuda, cuda:1, mps); {name!r} is none", "--device auto")
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
    """What computes products of `precision` where the device has them; they are float32 elsewhere, as weights are."""
    if precision == "bfloat16" and has_bfloat16(device):
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device has products of bfloat16; one that can only imitate them takes longer than for float32."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        has: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # of newer torch
        return any(has.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return False


def why_not_compiled(device: torch.device) -> str | None:
    """What keeps torch from compiling for a device, in a line; absent, it can, as was tried."""
    try:
        torch.compile(lambda x: (x * 2).relu())(torch.ones(8, device=device))
    except Exception as error:  # no compiler, no Triton, a Python it does not know: whatever it is, it cannot
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return None


def keep_freed_memory() -> None:
    """Let the C library keep what a step on a CPU frees for the next step, which takes as much again.

    To give it back to the system and get it anew, page by page, was 4 % of a step in float32 and 7 % in bfloat16. Where
    the library is not glibc, nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        library = ctypes.CDLL(None)
        library.mallopt(_MMAP_THRESHOLD, 32 * 2**20)  # the most it takes
        library.mallopt(_TRIM_THRESHOLD, 2**31 - 1)


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def default_workers(device: torch.device) -> int:
    """Processes that decode images: all cores beside a GPU; beside a CPU, which has its hands full, one in four.

    Several processes on this machine share the cores.
    """
    each = max(1, cores() // local_size())
    return min(16, each) if device.type != "cpu" else max(1, min(4, each // 4))


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: of the device's memory, or of this process where the device is the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
