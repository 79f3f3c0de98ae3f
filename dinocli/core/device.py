"""Device and precision of the computation, its peak memory, and the default number of decoding processes."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch

from dinocli.core.distributed import local_rank, local_size, size
from dinocli.core.errors import DinoError, reason_of
from dinocli.core.resources import cores

Precision = Literal["float32", "bfloat16"]
TrainingPrecision = Literal["float32", "tf32", "bfloat16", "float16"]


def pick_device(name: str) -> torch.device:
    """Return the device of a name; `auto` is the first available of CUDA, MPS and CPU.

    In a run of several processes, each gets the CUDA device of its local rank.

    Raises:
        DinoError: If the name is invalid or the device is not available.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        # MPS has no communication between processes.
        name = next(kind for kind, present in available.items() if present and (size() == 1 or kind != "mps"))
    try:
        device = torch.device(name)
        if device.type == "cuda" and size() > 1:
            device = torch.device("cuda", local_rank())
    except RuntimeError:
        device = None
    if device is None or device.type not in available:
        raise DinoError(f"--device {name!r} is not a device; expected auto, cpu, cuda, cuda:1 or mps", "--device auto")
    count = torch.cuda.device_count()
    if not available[device.type] or (device.type == "cuda" and (device.index or 0) >= count):
        kinds = ", ".join(kind for kind, present in available.items() if present)
        devices = f"{count} CUDA devices" if device.type == "cuda" and count else kinds
        raise DinoError(
            f"--device {name} is not available: torch {torch.__version__} finds {devices} on this machine",
            "--device auto",
        )
    return device


def autocast(device: torch.device, precision: str, *, cached: bool = True) -> contextlib.AbstractContextManager[Any]:
    """Return the autocast context for a precision; without native bfloat16, matrix products stay in float32.

    Args:
        device: Device of the tensors.
        precision: Precision of matrix products.
        cached: If False, each use of a weight casts it again, as torch asks for in CUDA graphs.
    """
    if precision == "bfloat16" and has_bfloat16(device):
        return torch.autocast(device.type, torch.bfloat16, cache_enabled=cached)
    if precision == "float16":
        return torch.autocast(device.type, torch.float16, cache_enabled=cached)
    return contextlib.nullcontext()


def training_precision(device: torch.device, wanted: TrainingPrecision) -> TrainingPrecision:
    """Return the precision in which a device trains: the one in a preset, or the nearest that is native.

    CUDA devices without bfloat16 (V100, T4, RTX 20) use float16, which needs loss scaling. Others use float32.
    """
    if wanted == "bfloat16" and not has_bfloat16(device):
        wanted = "float16"
    if wanted == "float16" and _capability(device) < _FLOAT16:
        return "float32"
    return "float32" if wanted == "tf32" and _capability(device) < _TF32 else wanted


_FLOAT16, _TF32 = (7, 0), (8, 0)  # compute capabilities of the first devices with such matrix products: V100, A100


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@contextlib.contextmanager
def float32_products(precision: TrainingPrecision) -> Iterator[None]:
    """Set how CUDA devices multiply float32 in the `with` block: exactly, or rounded to TF32 for `tf32`.

    torch's own default rounds convolutions, such as the patch embedding, and no other product.
    """
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def has_bfloat16(device: torch.device) -> bool:
    """Return True if a device multiplies bfloat16 natively; emulation is slower than float32."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return any(_processor().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return False


def multiplies_bfloat16_fast() -> bool:
    """Return True if the processor multiplies bfloat16 at least twice as fast as float32.

    Those with tiles (AMX) do, and AMD's with AVX-512's instructions for it, which make Intel's slower.
    """
    facts = _processor()
    on_amd = str(facts.get("cpu_name", "")).startswith("AMD")
    return bool(facts.get("amx_bf16") or (on_amd and facts.get("avx512_bf16")))


def _processor() -> Mapping[str, Any]:
    return getattr(torch.cpu, "get_capabilities", dict)()  # in newer torch only


def why_not_compiled(device: torch.device) -> str | None:
    """Try torch.compile on a device, and return its error in one line; None if it works."""
    try:
        torch.compile(lambda x: (x * 2).relu())(torch.ones(8, device=device))
    except Exception as error:  # no compiler, no Triton, an unknown Python: any error counts
        return reason_of(error)
    return None


def keep_freed_memory() -> None:
    """Make glibc keep the memory that a CPU step frees, so that the next step can reuse it.

    Otherwise it returns all blocks above 32 MB to the system and gets them back page by page. That takes 5 to 10 % of a
    step of `vits16` (16 images), and most of the time to normalize its views. With another C library this does nothing.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        library = ctypes.CDLL(None)
        library.mallopt(_MMAP_MAX, 0)  # no block of its own mapping
        library.mallopt(_TRIM_THRESHOLD, 2**31 - 1)


_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # from glibc's malloc.h


def default_workers(device: torch.device) -> int:
    """Return the default number of decoding processes: one per core but one, or one per four cores if the CPU trains.

    The run's processes on this machine share its cores. On a GPU each keeps a core for the thread that launches
    kernels: if a decoder takes its place, the GPU idles.
    """
    share = cores() // local_size()
    return max(1, min(16, share - 1) if device.type != "cpu" else min(4, share // 4))


def peak_memory(device: torch.device) -> int:
    """Return the peak memory use in bytes: of a CUDA device, or of this process for any other device."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def exactly(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return a context without autocast, for results that must not be rounded to bfloat16."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()  # this device has no autocast
