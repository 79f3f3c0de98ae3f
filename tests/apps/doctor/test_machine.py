"""Machine: cores and memory that a process may really use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from conftest import GB, write_file

from dinocli.apps.doctor import machine
from dinocli.apps.doctor.machine import look_at_machine


def test_cores_are_limited_by_affinity_and_control_group(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(machine, "faults_of", lambda *about: {})
    write_file(root, "proc/cpuinfo", "processor : 0\nmodel name\t: A Processor\n")
    seen = look_at_machine(torch.device("cpu"), root, root)
    assert (seen.cores, seen.cores_there) == (12, 64)
    assert (seen.name, seen.memory, seen.on_cpu, seen.faults) == ("A Processor", seen.ram, True, {})
    write_file(root, "proc/self/cgroup", "0::/\n")
    write_file(root, "sys/fs/cgroup/cpu.max", "400000 100000\n")
    assert look_at_machine(torch.device("cpu"), root, root).cores == 4


def test_a_full_disk_is_a_fault(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "faults_of", lambda *about: {})
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": GB})())
    seen = look_at_machine(torch.device("cpu"), root, root)
    assert list(seen.faults) == [f"1.0 GB are free in {root}"]
