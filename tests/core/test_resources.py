"""Resources: limits of a container on memory and cores, and their users."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import GB, write_file

from dinocli.core import device, resources
from dinocli.core.resources import cores_of_group, ram_of
from dinocli.data.loader.cache import PixelCache
from dinocli.data.views.crops import ViewConfig


def test_without_a_control_group_the_limits_are_the_machines(root: Path) -> None:
    assert cores_of_group(root) is None
    assert ram_of(root) == (pytest.approx(50 * GB, abs=2048), pytest.approx(64 * GB, abs=2048))


def test_version_2_groups_limit_memory_and_cores_including_outer_groups(root: Path) -> None:
    write_file(root, "proc/self/cgroup", "0::/jobs/17\n")
    write_file(root, "sys/fs/cgroup/jobs/17/cpu.max", "max 100000\n")
    write_file(root, "sys/fs/cgroup/jobs/17/memory.max", "max\n")
    write_file(root, "sys/fs/cgroup/jobs/cpu.max", "250000 100000\n")
    write_file(root, "sys/fs/cgroup/jobs/memory.max", f"{16 * GB}\n")
    write_file(root, "sys/fs/cgroup/jobs/memory.current", f"{10 * GB}\n")
    assert cores_of_group(root) == 2
    assert ram_of(root) == (6 * GB, 16 * GB)
    write_file(root, "sys/fs/cgroup/jobs/memory.stat", f"anon 1\ninactive_file {4 * GB}\n")
    assert ram_of(root) == (10 * GB, 16 * GB)  # the file cache is reclaimable


def test_version_1_groups_limit_memory_and_cores(root: Path) -> None:
    write_file(root, "proc/self/cgroup", "4:memory:/docker/ab\n1:cpu,cpuacct:/docker/ab\n0::/\n")
    # Inside a container the group is the mount itself, and the path is the host's.
    write_file(root, "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "50000\n")
    write_file(root, "sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n")
    write_file(root, "sys/fs/cgroup/memory/memory.limit_in_bytes", f"{8 * GB}\n")
    write_file(root, "sys/fs/cgroup/memory/memory.usage_in_bytes", f"{7 * GB}\n")
    write_file(root, "sys/fs/cgroup/memory/memory.stat", f"inactive_file 5\ntotal_inactive_file {2 * GB}\n")
    assert cores_of_group(root) == 1  # at least one, even with a quota of half a core
    assert ram_of(root) == (3 * GB, 8 * GB)


def test_groups_without_limits_are_ignored(root: Path) -> None:
    write_file(root, "proc/self/cgroup", "1:cpu:/\n4:memory:/\n")
    write_file(root, "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n")
    write_file(root, "sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n")
    write_file(root, "sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    write_file(root, "sys/fs/cgroup/memory/memory.usage_in_bytes", f"{GB}\n")
    assert cores_of_group(root) is None
    assert ram_of(root)[1] == pytest.approx(64 * GB, abs=2048)


def test_workers_and_pixel_cache_respect_the_limits_of_a_container(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_file(root, "proc/self/cgroup", "0::/\n")
    write_file(root, "sys/fs/cgroup/cpu.max", "800000 100000\n")
    write_file(root, "sys/fs/cgroup/memory.max", f"{2 * GB}\n")
    write_file(root, "sys/fs/cgroup/memory.current", f"{GB}\n")
    monkeypatch.setattr(resources.os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    assert resources.cores(root) == 8
    assert resources.ram_of(root) == (GB, 2 * GB)
    monkeypatch.setattr(device, "cores", lambda: resources.cores(root))
    assert (device.default_workers(torch.device("cuda")), device.default_workers(torch.device("cpu"))) == (7, 2)
    monkeypatch.setattr("dinocli.data.loader.cache.ram_of", lambda: resources.ram_of(root))
    assert len(PixelCache(1, [ViewConfig(size=8, scale=(0.4, 1.0))], "ram")._memory) == GB // 2
