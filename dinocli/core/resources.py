"""Memory and cores that this process may use, which a container may limit, free disk space, and the cache folder."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

ROOT = Path("/")


def cores(root: Path = ROOT) -> int:
    """Return the number of cores that this process may use, by its affinity and its control group."""
    affine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(affine, cores_of_group(root) or affine)


def cores_of_group(root: Path = ROOT) -> int | None:
    """Return the number of cores that the control group allows, rounded down but at least 1; None without a limit.

    Most containers are limited in this way. torch reads only the affinity, and so starts one thread per core of the
    machine.
    """
    limits = []
    for group in _list_groups(root, "cpu"):
        quota, _, period = read_words(group / "cpu.max").partition(" ")
        if not quota:
            quota, period = read_words(group / "cpu.cfs_quota_us"), read_words(group / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit():
            limits.append(max(1, int(quota) // int(period)))
    return min(limits, default=None)


def ram_of(root: Path = ROOT) -> tuple[int, int]:
    """Return the bytes available to this process without swapping, and the total bytes."""
    meminfo = dict(re.findall(r"^(\w+):\s+(\d+) kB", read_words(root / "proc/meminfo"), re.MULTILINE))
    if {"MemTotal", "MemAvailable"} <= meminfo.keys():
        free, total = int(meminfo["MemAvailable"]) * 1024, int(meminfo["MemTotal"]) * 1024
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        free = total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:  # Windows
        free = total = 0
    for group in _list_groups(root, "memory"):
        limit = read_words(group / "memory.max") or read_words(group / "memory.limit_in_bytes")
        used = read_words(group / "memory.current") or read_words(group / "memory.usage_in_bytes")
        # The group's file cache counts as used but is released on demand.
        stat = dict(re.findall(r"^(\w+) (\d+)$", read_words(group / "memory.stat"), re.MULTILINE))
        if limit.isdigit() and used.isdigit() and int(limit) < total:
            reclaimable = int(stat.get("total_inactive_file") or stat.get("inactive_file") or 0)
            total, free = int(limit), max(0, min(free, int(limit) - int(used) + reclaimable))
    return free, total


def cache_folder() -> Path:
    """Return the folder for data that the tool can recreate."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dinocli"


def _list_groups(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of this process's control groups (version 1 or 2), from the innermost outwards."""
    for line in read_words(root / "proc/self/cgroup").splitlines():
        _, names, path = (line + "::").split(":")[:3]
        mounts = {"": ("", "unified")}.get(names, (controller,) if controller in names.split(",") else ())
        for mount in mounts:
            # Inside a container, the path may be the host's; the root of the mount is then the container's group.
            group = (root / "sys/fs/cgroup" / mount / path.lstrip("/")).relative_to(root)
            while len(group.parts) >= 3 + bool(mount):
                yield root / group
                group = group.parent


def read_words(path: Path) -> str:
    """Return the text of a small system file, or an empty string if it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def memory_of(device: torch.device, root: Path = ROOT) -> tuple[int, int]:
    """Return the available and total bytes of a device; for the CPU, those of this process."""
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    if device.type == "mps":
        total = torch.mps.recommended_max_memory()
        return total - torch.mps.driver_allocated_memory(), total
    return ram_of(root)


def free_space(path: Path) -> tuple[Path, int]:
    """Return the nearest existing folder of a path that may not exist yet, and the free bytes of its disk."""
    there = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
    return there, shutil.disk_usage(there).free


def format_bytes(amount: float) -> str:
    """Format a number of bytes, such as `1.2 GB`."""
    return f"{amount / 1e9:.1f} GB" if amount >= 1e9 else f"{amount / 1e6:.0f} MB"
