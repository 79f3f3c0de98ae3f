"""Machine: cores and memory that a process may really use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from dinocli.apps.doctor import machine
from dinocli.apps.doctor.machine import look_at_machine
from dinocli.core.resources import cores_of_group, ram_of

GB = 10**9


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A file system of a machine with 64 GB, 50 of them free, and no control group."""
    write(
        tmp_path, "proc/meminfo", f"MemTotal: {64 * GB // 1024} kB\nMemFree: 1 kB\nMemAvailable: {50 * GB // 1024} kB\n"
    )
    return tmp_path


def write(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def test_without_a_control_group_it_is_the_machine(root: Path) -> None:
    assert cores_of_group(root) is None
    assert ram_of(root) == (pytest.approx(50 * GB, abs=2048), pytest.approx(64 * GB, abs=2048))


def test_version_2_bounds_both_and_the_outer_group_counts_too(root: Path) -> None:
    write(root, "proc/self/cgroup", "0::/jobs/17\n")
    write(root, "sys/fs/cgroup/jobs/17/cpu.max", "max 100000\n")
    write(root, "sys/fs/cgroup/jobs/17/memory.max", "max\n")
    write(root, "sys/fs/cgroup/jobs/cpu.max", "250000 100000\n")
    write(root, "sys/fs/cgroup/jobs/memory.max", f"{16 * GB}\n")
    write(root, "sys/fs/cgroup/jobs/memory.current", f"{10 * GB}\n")
    assert cores_of_group(root) == 2
    assert ram_of(root) == (6 * GB, 16 * GB)
    write(root, "sys/fs/cgroup/jobs/memory.stat", f"anon 1\ninactive_file {4 * GB}\n")
    assert ram_of(root) == (10 * GB, 16 * GB)  # what is cached of files is given up


def test_version_1_bounds_both(root: Path) -> None:
    write(root, "proc/self/cgroup", "4:memory:/docker/ab\n1:cpu,cpuacct:/docker/ab\n0::/\n")
    # Inside a container the group is the mount itself, and the path is the host's.
    write(root, "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "50000\n")
    write(root, "sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n")
    write(root, "sys/fs/cgroup/memory/memory.limit_in_bytes", f"{8 * GB}\n")
    write(root, "sys/fs/cgroup/memory/memory.usage_in_bytes", f"{7 * GB}\n")
    write(root, "sys/fs/cgroup/memory/memory.stat", f"inactive_file 5\ntotal_inactive_file {2 * GB}\n")
    assert cores_of_group(root) == 1  # half a core is one all the same
    assert ram_of(root) == (3 * GB, 8 * GB)


def test_no_limit_is_none(root: Path) -> None:
    write(root, "proc/self/cgroup", "1:cpu:/\n4:memory:/\n")
    write(root, "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n")
    write(root, "sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n")
    write(root, "sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    write(root, "sys/fs/cgroup/memory/memory.usage_in_bytes", f"{GB}\n")
    assert cores_of_group(root) is None
    assert ram_of(root)[1] == pytest.approx(64 * GB, abs=2048)


def test_cores_are_those_of_affinity_and_group(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(machine, "faults_of", lambda *about: {})
    write(root, "proc/cpuinfo", "processor : 0\nmodel name\t: A Processor\n")
    seen = look_at_machine(torch.device("cpu"), root, root)
    assert (seen.cores, seen.cores_there) == (12, 64)
    assert (seen.name, seen.memory, seen.on_cpu, seen.faults) == ("A Processor", seen.ram, True, {})
    write(root, "proc/self/cgroup", "0::/\n")
    write(root, "sys/fs/cgroup/cpu.max", "400000 100000\n")
    assert look_at_machine(torch.device("cpu"), root, root).cores == 4


def test_a_full_disk_is_a_fault(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "faults_of", lambda *about: {})
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": GB})())
    seen = look_at_machine(torch.device("cpu"), root, root)
    assert list(seen.faults) == [f"1.0 GB are free in {root}"]
