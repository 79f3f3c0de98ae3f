"""Machine: hardware, limits and installation."""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from dinocli.data.decode import has_fast_jpeg
from dinocli.device import cores
from dinocli.installation import faults_of, readable, version

_ROOT = Path("/")
_LITTLE_DISK = 2e9  # bytes; a run of ViT-S/16 writes its weights, a new copy next to the old one, and a log


@dataclass(frozen=True)
class Machine:
    """Hardware, limits and installation of this machine.

    Attributes:
        python: Version of Python.
        torch: Version with the build variant: `2.11.0+cu130`.
        torchvision: Version, or None if not installed.
        timm: Version, or None if not installed.
        dinocli: Version of this package.
        device: Device name in torch: `cpu`, `cuda`, `cuda:1`, `mps`.
        name: Product name of the device.
        devices: Number of devices of this kind.
        memory: Available bytes of device memory; on a CPU, of process memory.
        memory_there: Total bytes of device memory.
        cores: Cores available to this process, by affinity and control group.
        cores_affine: Cores by affinity alone, which is all that other programs query.
        cores_there: Cores of the machine.
        ram: Bytes available to this process, by system and control group.
        ram_there: Bytes of the machine, or the control group's limit if lower.
        folder: Folder for runs.
        disk: Free bytes on the disk of `folder`.
        formats: Image formats that were written and read back.
        fast_jpeg: True if torch's libraries decode JPEGs.
        faults: Faults of the installation, with fixes.
    """

    python: str
    torch: str
    torchvision: str | None
    timm: str | None
    dinocli: str
    device: str
    name: str
    devices: int
    memory: int
    memory_there: int
    cores: int
    cores_affine: int
    cores_there: int
    ram: int
    ram_there: int
    folder: str
    disk: int
    formats: list[str]
    fast_jpeg: bool
    faults: dict[str, str]

    @property
    def on_cpu(self) -> bool:
        """True if the CPU is the fastest device."""
        return self.device == "cpu"


def look_at_machine(device: torch.device, folder: Path = Path(), root: Path = _ROOT) -> Machine:
    """Detect and test hardware and installation, without writing anything.

    Args:
        device: Device to compute on.
        folder: Folder for runs.
        root: Root of the file system that holds /proc and /sys.
    """
    import dinocli

    affine, there = cores(), os.cpu_count() or 1
    ram, ram_there = ram_of(root)
    memory, memory_there = memory_of(device, root)
    name, devices = _name(device, root)
    formats, disk = readable(), shutil.disk_usage(folder).free
    faults = faults_of(device, formats, root)
    if disk < _LITTLE_DISK:
        faults[f"{disk / 1e9:.1f} GB are free in {folder.resolve()}"] = "free some, or name another place with --out"
    if not os.access(folder, os.W_OK):
        faults[f"{folder.resolve()} may not be written to"] = "work in a folder of your own, or name one with --out"
    return Machine(
        python=platform.python_version(),
        torch=torch.__version__,
        torchvision=version("torchvision"),
        timm=version("timm"),
        dinocli=dinocli.__version__,
        device=str(device),
        name=name,
        devices=devices,
        memory=memory,
        memory_there=memory_there,
        cores=min(affine, cores_of_group(root) or affine),
        cores_affine=affine,
        cores_there=there,
        ram=ram,
        ram_there=ram_there,
        folder=str(folder.resolve()),
        disk=disk,
        formats=formats,
        fast_jpeg=has_fast_jpeg(),
        faults=faults,
    )


def cores_of_group(root: Path = _ROOT) -> int | None:
    """Return the whole cores that the control group may use, or None without a limit.

    Most container limits work this way. torch queries the affinity alone, and then starts one thread per core of the
    machine.
    """
    limits = []
    for group in _groups(root, "cpu"):
        quota, _, period = _words(group / "cpu.max").partition(" ")
        if not quota:
            quota, period = _words(group / "cpu.cfs_quota_us"), _words(group / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit():
            limits.append(max(1, int(quota) // int(period)))
    return min(limits, default=None)


def ram_of(root: Path = _ROOT) -> tuple[int, int]:
    """Return the bytes available to this process without swapping, and the total bytes."""
    known = dict(re.findall(r"^(\w+):\s+(\d+) kB", _words(root / "proc/meminfo"), re.MULTILINE))
    if {"MemTotal", "MemAvailable"} <= known.keys():
        free, total = int(known["MemAvailable"]) * 1024, int(known["MemTotal"]) * 1024
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        free = total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:  # Windows
        free = total = 0
    for group in _groups(root, "memory"):
        limit = _words(group / "memory.max") or _words(group / "memory.limit_in_bytes")
        used = _words(group / "memory.current") or _words(group / "memory.usage_in_bytes")
        # The group's file cache counts as used but is released on demand.
        cached = dict(re.findall(r"^(\w+) (\d+)$", _words(group / "memory.stat"), re.MULTILINE))
        if limit.isdigit() and used.isdigit() and int(limit) < total:
            given_up = int(cached.get("total_inactive_file") or cached.get("inactive_file") or 0)
            total, free = int(limit), max(0, min(free, int(limit) - int(used) + given_up))
    return free, total


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of this process's control groups, from its own outwards, for versions 2 and 1."""
    for line in _words(root / "proc/self/cgroup").splitlines():
        _, names, path = (line + "::").split(":")[:3]
        mounts = {"": ("", "unified")}.get(names, (controller,) if controller in names.split(",") else ())
        for mount in mounts:
            # Inside a container, the path may be the host's; the mount itself is then the group.
            group = (root / "sys/fs/cgroup" / mount / path.lstrip("/")).relative_to(root)
            while len(group.parts) >= 3 + bool(mount):
                yield root / group
                group = group.parent


def _words(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def memory_of(device: torch.device, root: Path = _ROOT) -> tuple[int, int]:
    """Return the available and total bytes of a device; on a CPU, of the process."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    if device.type == "mps":
        total = torch.mps.recommended_max_memory()
        return total - torch.mps.driver_allocated_memory(), total
    return ram_of(root)


def _name(device: torch.device, root: Path) -> tuple[str, int]:
    """Return a device's product name, and the number of devices of its kind."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device), torch.cuda.device_count()
    if device.type == "mps":
        return "Apple GPU", 1
    model = re.search(r"^model name\s*: (.+)$", _words(root / "proc/cpuinfo"), re.MULTILINE)
    return model[1] if model else platform.processor() or platform.machine(), 1
