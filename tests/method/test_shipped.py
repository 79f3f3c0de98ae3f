from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from dinocli.core.errors import DinoError
from dinocli.method import shipped


def test_shipped_presets_are_listed_and_fully_described() -> None:
    assert {"tiny", "vits16", "vits8", "vitb16", "vitb8", "resnet50"} <= set(shipped.names())
    for name in shipped.names():
        about = tomllib.loads(shipped.text(name))["about"]
        assert all(about[key] for key in ("recipe", "source", "command", "cost", "expected")), name


def test_an_unknown_name_suggests_the_nearest_preset() -> None:
    with pytest.raises(DinoError) as error:
        shipped.text("resnet5")
    assert "resnet50" in error.value.hint


@pytest.mark.parametrize("beside", [True, False])
def test_presets_are_found_in_a_checkout_that_is_not_installed(tmp_path: Path, beside: bool) -> None:
    """A copy of the package is imported by an interpreter without installed packages."""
    root = Path(shipped.__file__).parents[2]
    for name in ("__init__", "core/__init__", "core/version", "core/errors", "method/__init__", "method/shipped"):
        (tmp_path / "dinocli" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / "dinocli" / f"{name}.py", tmp_path / "dinocli" / f"{name}.py")
    if beside:
        shutil.copytree(root / "presets", tmp_path / "presets")
    code = "from dinocli.method import shipped; print(len(shipped.names()), 'dino pretrain' in shipped.text('tiny'))"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": ""},
    )
    if beside:
        assert done.stdout.split() == [str(len(shipped.names())), "True"], done.stderr
    else:
        assert "the presets are not installed" in done.stderr
        assert "hint: pip install ." in done.stderr
