"""Installation: checks of package versions, imports, image formats and the device."""

from __future__ import annotations

import importlib.metadata
import io
from collections.abc import Callable
from pathlib import Path

import torch
from packaging.requirements import Requirement
from PIL import Image

from dinocli.core.device import autocast
from dinocli.core.errors import reason_of
from dinocli.data.decode.image import decode
from dinocli.data.decode.pixels import BadImage

_KINDS = ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "AVIF", "JPEG2000")


def faults_of(device: torch.device, formats: list[str], root: Path = Path("/")) -> dict[str, str]:
    """Return the faults of this installation with their fixes; empty if it works.

    Args:
        device: Device to try each operation on.
        formats: Formats returned by `readable`.
        root: Root of the file system that holds /proc.
    """
    missing = [kind for kind in _KINDS if kind not in formats]
    format_faults = {f"{', '.join(missing)} cannot be read": "pip install --upgrade pillow"} if missing else {}
    return _check_versions() | _check_imports() | _check_gpu(device, root) | _check_device(device) | format_faults


def version(package: str) -> str | None:
    """Return the installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def readable() -> list[str]:
    """Return the image formats that can be read, tested by writing and reading an image."""
    read = []
    for kind in _KINDS:
        file = io.BytesIO()
        try:
            Image.new("RGB", (16, 16), (200, 100, 50)).save(file, kind)
        except (OSError, KeyError):  # Pillow was built without this format
            continue
        if not isinstance(decode(file.getvalue()), BadImage):
            read.append(kind)
    return read


def _check_versions() -> dict[str, str]:
    packages = [package for package in ("dinocli", "torchvision", "timm") if version(package)]
    requirements = [(package, line) for package in packages for line in importlib.metadata.requires(package) or []]
    faults = [misfit(package, line, version) for package, line in requirements]
    return {fault: "pip install --upgrade torch torchvision timm" for fault in faults if fault}


def misfit(package: str, requirement: str, installed: Callable[[str], str | None]) -> str | None:
    """Return a message if an installed version does not meet another package's requirement, else None.

    Args:
        package: Package that states the requirement.
        requirement: Line of its metadata: `torch==2.11.0`, `torch (>=2.14.0)`, `numpy`. Requirements of extras and of
            other platforms are ignored.
        installed: Returns the installed version of a package by name, or None.
    """
    needed = Requirement(requirement)
    if needed.marker and not needed.marker.evaluate({"extra": ""}):
        return None
    has = installed(needed.name)
    if has is None:
        return f"{package} needs {needed.name}, which is not installed"
    if needed.specifier.contains(has, prereleases=True):
        return None
    return f"{package} {installed(package)} needs {needed.name} {needed.specifier}; {has} is installed"


def _check_imports() -> dict[str, str]:
    faults = {}
    try:
        from torchvision.ops import nms

        nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([1.0]), 0.5)
    except Exception as error:  # a build for another torch raises ImportError, OSError or RuntimeError
        faults[f"torchvision does not work: {reason_of(error)}"] = "pip install --force-reinstall torch torchvision"
    try:
        import timm  # noqa: F401
    except Exception as error:
        faults[f"timm cannot be loaded: {reason_of(error)}"] = "pip install --force-reinstall timm"
    return faults


def _check_gpu(device: torch.device, root: Path) -> dict[str, str]:
    if device.type != "cpu" or torch.cuda.is_available() or not (root / "proc/driver/nvidia/version").exists():
        return {}
    why = "is built without CUDA" if torch.version.cuda is None else "finds no usable device"
    return {
        f"an NVIDIA driver is installed, but torch {torch.__version__} {why}": "nvidia-smi; then a torch that fits the "
        "driver: https://pytorch.org/get-started/locally"
    }


def _check_device(device: torch.device) -> dict[str, str]:
    try:
        fault = _check_computing(device)
    except Exception as error:  # a torch built without this device fails here
        fault = reason_of(error)
    hint = "another --device, or a torch built for this one"
    return {f"computing on {device} failed: {fault}": hint} if fault else {}


def _check_computing(device: torch.device) -> str:
    """Return the fault of a small matrix product or a bfloat16 training step, or an empty string."""
    a = torch.linspace(-1, 1, 128 * 128).reshape(128, 128)
    product = (a.to(device) @ a.to(device).T).cpu()
    if not torch.allclose(product, a @ a.T, rtol=1e-2, atol=1e-2):
        return "a matrix product is wrong"
    weights = torch.full((8, 128), 0.01, device=device, requires_grad=True)
    with autocast(device, "bfloat16"):
        loss = torch.nn.functional.linear(a.to(device), weights).square().mean()
    loss.backward()
    fine = weights.grad is not None and bool(torch.isfinite(weights.grad).all())
    return "" if fine else "the gradient of a small step is not finite"
