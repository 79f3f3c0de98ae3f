from __future__ import annotations

import contextlib
import platform
import subprocess
import sys

import pytest
import torch

from dinocli.core import device as device_module
from dinocli.core.device import (
    autocast,
    default_workers,
    exactly,
    float32_products,
    has_bfloat16,
    multiplies_bfloat16_fast,
    peak_memory,
    pick_device,
    training_precision,
    why_not_compiled,
)
from dinocli.core.errors import DinoError


def test_auto_picks_an_available_device() -> None:
    torch.zeros(1, device=pick_device("auto"))
    assert pick_device("cpu").type == "cpu"


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "xpu", ""])
def test_unavailable_devices_are_refused_with_a_hint(name: str) -> None:
    with pytest.raises(DinoError) as error:
        pick_device(name)
    assert error.value.hint == "--device auto"


def test_autocast_uses_bfloat16_only_on_request_and_with_native_support(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    a = torch.randn(4, 4)
    for native in (True, False):
        monkeypatch.setattr(device_module, "has_bfloat16", lambda device, native=native: native)
        with autocast(cpu, "bfloat16"):
            assert (a @ a).dtype == (torch.bfloat16 if native else torch.float32)
        for exact in ("float32", "tf32"):
            assert isinstance(autocast(cpu, exact), contextlib.nullcontext)
    with autocast(cpu, "float16"):
        assert (a @ a).dtype == torch.float16


@pytest.mark.parametrize(
    ("capabilities", "native"),
    [({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"bf16": True}, True), ({"avx512_f": True}, False)],
)
def test_native_bfloat16_is_read_from_the_cpu_capabilities(
    capabilities: dict, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert has_bfloat16(torch.device("cpu")) == native
    assert not has_bfloat16(torch.device("mps"))


@pytest.mark.parametrize(
    ("capabilities", "fast"),
    [
        ({"amx_bf16": True, "avx512_bf16": True, "cpu_name": "Intel Xeon"}, True),
        ({"amx_bf16": False, "avx512_bf16": True, "cpu_name": "Intel Xeon"}, False),
        ({"amx_bf16": False, "avx512_bf16": True, "cpu_name": "AMD EPYC"}, True),
        ({"amx_bf16": False, "avx512_bf16": False, "cpu_name": "AMD EPYC"}, False),
        ({}, False),
    ],
)
def test_bfloat16_is_fast_by_tiles_or_on_amd(capabilities: dict, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert multiplies_bfloat16_fast() == fast


@pytest.mark.parametrize(
    ("kind", "capability", "trains_in"),
    [
        ("cuda", (9, 0), {"bfloat16": "bfloat16", "float16": "float16", "tf32": "tf32", "float32": "float32"}),
        ("cuda", (7, 5), {"bfloat16": "float16", "float16": "float16", "tf32": "float32", "float32": "float32"}),
        ("cuda", (6, 1), dict.fromkeys(("bfloat16", "float16", "tf32", "float32"), "float32")),
        ("cpu", (0, 0), {"bfloat16": "float32", "float16": "float32", "tf32": "float32", "float32": "float32"}),
    ],
)
def test_training_falls_back_to_the_nearest_native_precision(
    kind: str, capability: tuple[int, int], trains_in: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_module, "has_bfloat16", lambda device: capability >= (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert {p: training_precision(torch.device(kind), p) for p in trains_in} == trains_in


def test_float32_products_are_exact_unless_tf32_is_set() -> None:
    def read() -> tuple[str, bool]:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    before = read()
    for precision, inside in (
        ("tf32", ("high", True)),
        ("float32", ("highest", False)),
        ("bfloat16", ("highest", False)),
    ):
        with contextlib.suppress(KeyError), float32_products(precision):
            assert read() == inside
            raise KeyError
        assert read() == before


def test_the_error_of_a_failed_compilation_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_(function: object) -> object:
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(torch, "compile", compile_)
    assert why_not_compiled(torch.device("cpu")) == "no compiler"


def test_a_cpu_gets_at_most_four_workers() -> None:
    cpu = torch.device("cpu")
    assert 1 <= default_workers(cpu) <= 4
    assert peak_memory(cpu) > 1e6


@pytest.mark.parametrize(
    ("cores", "processes", "on_gpu", "on_cpu"),
    [(1, 1, 1, 1), (2, 1, 1, 1), (8, 1, 7, 2), (16, 1, 15, 4), (64, 1, 16, 4), (64, 8, 7, 2), (4, 8, 1, 1)],
)
def test_workers_leave_a_core_to_the_thread_that_launches_kernels(
    cores: int, processes: int, on_gpu: int, on_cpu: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_module, "cores", lambda: cores)
    monkeypatch.setattr(device_module, "local_size", lambda: processes)
    assert default_workers(torch.device("cuda")) == default_workers(torch.device("mps")) == on_gpu
    assert default_workers(torch.device("cpu")) == on_cpu


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_memory_freed_by_a_step_is_reused_by_the_next() -> None:
    """Count the page faults of two child processes, one with and one without `keep_freed_memory`."""
    code = """
import os, resource, torch
from dinocli.core.device import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.zeros(size) for size in 32 * [2**20] + 2 * [2**24]]  # 128 MiB in pieces of 4, and of 64
    del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for keep in (lambda: None, keep_freed_memory):
    if not os.fork():
        keep()
        faults()
        print(faults(), flush=True)
        os._exit(0)
    os.wait()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    counts = [int(line) for line in done.stdout.splitlines()]
    assert len(counts) == 2
    assert counts[1] < counts[0] / 4, counts


def test_exactly_switches_autocast_off() -> None:
    a = torch.randn(8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
        with exactly(a.device):
            assert torch.equal(a @ a, torch.mm(a, a))
            assert (a @ a).dtype == torch.float32


def test_exactly_does_nothing_on_devices_without_autocast() -> None:
    with exactly(torch.device("meta")):
        assert torch.empty(2, 2, device="meta").matmul(torch.empty(2, 2, device="meta")).shape == (2, 2)
