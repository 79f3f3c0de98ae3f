"""Machine: hardware, limits and installation, as detected."""

from __future__ import annotations

import os
import platform
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from dinocli.apps.doctor.installation import faults_of, readable, version
from dinocli.core.resources import ROOT, cores, memory_of, ram_of, read_words
from dinocli.data.decode.torch_codecs import has_fast_jpeg

_LITTLE_DISK = 2e9  # bytes; a run of ViT-S/16 writes weights, a second copy of them while it replaces them, and a log


@dataclass(frozen=True)
class Machine:
    """Hardware, limits and installation of this machine.

    Attributes:
        torch: Version with the build variant: `2.11.0+cu130`.
        torchvision: Version, or None if not installed.
        timm: Version, or None if not installed.
        dinocli: Version of this package.
        device: Device name in torch: `cpu`, `cuda`, `cuda:1`, `mps`.
        name: Product name of the device.
        devices: Number of devices of this kind.
        memory: Available bytes of device memory; on a CPU, of process memory.
        memory_there: Total bytes of the same memory.
        cores: Cores available to this process, by affinity and control group.
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


def look_at_machine(device: torch.device, folder: Path = Path(), root: Path = ROOT) -> Machine:
    """Detect and test hardware and installation, without writing anything.

    Args:
        device: Device whose name and memory are read.
        folder: Folder for runs.
        root: Root of the file system that holds /proc and /sys.
    """
    import dinocli

    cores_there = os.cpu_count() or 1
    ram, ram_there = ram_of(root)
    memory, memory_there = memory_of(device, root)
    name, devices = _read_name(device, root)
    formats, disk = readable(), shutil.disk_usage(folder).free
    faults = faults_of(device, formats, root)
    if disk < _LITTLE_DISK:
        faults[f"{disk / 1e9:.1f} GB are free in {folder.resolve()}"] = (
            "free some space, or name another place with --out"
        )
    if not os.access(folder, os.W_OK):
        faults[f"{folder.resolve()} is not writable"] = "work in a folder of your own, or name one with --out"
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
        cores=cores(root),
        cores_there=cores_there,
        ram=ram,
        ram_there=ram_there,
        folder=str(folder.resolve()),
        disk=disk,
        formats=formats,
        fast_jpeg=has_fast_jpeg(),
        faults=faults,
    )


def _read_name(device: torch.device, root: Path) -> tuple[str, int]:
    """Return a device's product name, and the number of devices of its kind."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device), torch.cuda.device_count()
    if device.type == "mps":
        return "Apple GPU", 1
    model = re.search(r"^model name\s*: (.+)$", read_words(root / "proc/cpuinfo"), re.MULTILINE)
    return model[1] if model else platform.processor() or platform.machine(), 1
