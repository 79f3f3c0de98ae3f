"""Resources: the limits of a container reach whatever asks for memory or cores."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_machine import GB, root, write

from dinocli.core import device, resources
from dinocli.data.loader.cache import PixelCache
from dinocli.data.views.crops import ViewConfig

__all__ = ["root"]


def test_workers_and_the_cache_keep_to_a_containers_limits(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(root, "proc/self/cgroup", "0::/\n")
    write(root, "sys/fs/cgroup/cpu.max", "800000 100000\n")
    write(root, "sys/fs/cgroup/memory.max", f"{2 * GB}\n")
    write(root, "sys/fs/cgroup/memory.current", f"{GB}\n")
    monkeypatch.setattr(resources.os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    assert resources.cores(root) == 8
    assert resources.ram_of(root) == (GB, 2 * GB)
    monkeypatch.setattr(device, "cores", lambda: resources.cores(root))
    assert (device.default_workers(torch.device("cuda")), device.default_workers(torch.device("cpu"))) == (8, 2)
    monkeypatch.setattr("dinocli.data.loader.cache.ram_of", lambda: resources.ram_of(root))
    assert len(PixelCache(1, [ViewConfig(size=8, scale=(0.4, 1.0))], "ram")._memory) == GB // 2
