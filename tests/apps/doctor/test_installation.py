"""Installation: packages that do not fit together are reported, and those that do are not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dinocli.apps.doctor import installation
from dinocli.apps.doctor.installation import faults_of, misfit, readable

HAS = {"torch": "2.15.0+cu132", "numpy": "2.1.3", "torchvision": "0.29.2"}


@pytest.mark.parametrize(
    ("requirement", "fault"),
    [
        ("torch==2.15.0", None),
        ("torch (>=2.14.0)", None),
        ("torch>=2.15", None),
        ("torch<3,>=2.15", None),
        ("torch<2.15", "torchvision 0.29.2 needs torch <2.15; 2.15.0+cu132 is installed"),
        ("torch>=2.15.0.dev1", None),
        ("numpy", None),
        ("numpy (!=2.0.*,>=1.26)", None),
        ("torch==2.14.0", "torchvision 0.29.2 needs torch ==2.14.0; 2.15.0+cu132 is installed"),
        ("torch>=2.15.1", "torchvision 0.29.2 needs torch >=2.15.1; 2.15.0+cu132 is installed"),
        ("torch (>=3)", "torchvision 0.29.2 needs torch >=3; 2.15.0+cu132 is installed"),
        ("pillow>=5.3", "torchvision needs pillow, which is not installed"),
        ('scipy; extra == "scipy"', None),
        ('win-thing>=1; sys_platform == "no-such-platform"', None),
        ('here>=1; python_version >= "3"', "torchvision needs here, which is not installed"),
    ],
)
def test_a_version_that_does_not_meet_a_requirement_is_named(requirement: str, fault: str | None) -> None:
    assert misfit("torchvision", requirement, HAS.get) == fault


def test_this_installation_has_no_faults() -> None:
    assert faults_of(torch.device("cpu"), readable(), Path("/nowhere")) == {}
    assert {"JPEG", "PNG", "TIFF"} <= set(readable())


def test_an_unreadable_format_is_reported() -> None:
    without = [kind for kind in readable() if kind != "PNG"]
    assert list(faults_of(torch.device("cpu"), without, Path("/nowhere"))) == ["PNG cannot be read"]


def test_an_idle_gpu_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = tmp_path / "proc/driver/nvidia/version"
    driver.parent.mkdir(parents=True)
    driver.touch()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    (fault,) = faults_of(torch.device("cpu"), readable(), tmp_path)
    assert "NVIDIA" in fault
    assert "without CUDA" in fault
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # there it was the user who chose the CPU
    assert faults_of(torch.device("cpu"), readable(), tmp_path) == {}


def test_a_device_that_computes_wrongly_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, w: real(x, w) * float("nan"))
    (fault,) = faults_of(torch.device("cpu"), readable(), Path("/nowhere"))
    assert "not finite" in fault


def test_an_exception_of_the_device_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device: torch.device) -> str:
        raise RuntimeError("CUDA error: no kernel image is available\nmore words")

    monkeypatch.setattr(installation, "_check_computing", broken)
    assert list(faults_of(torch.device("cpu"), readable(), Path("/nowhere"))) == [
        "computing on cpu failed: CUDA error: no kernel image is available"
    ]
