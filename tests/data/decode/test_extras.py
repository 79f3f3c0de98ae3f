from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from dinocli.data.decode.extras import EXTRAS, Extra, extra_for


def test_every_extra_is_one_that_pip_installs() -> None:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())
    assert {extra.name for extra in EXTRAS} <= set(project["project"]["optional-dependencies"])


def test_a_suffix_belongs_to_one_extra() -> None:
    suffixes = [suffix for extra in EXTRAS for suffix in extra.suffixes]
    assert len(suffixes) == len(set(suffixes)) and all(suffix == suffix.lower() for suffix in suffixes)
    heic = extra_for(".heic")
    assert heic and heic.pip == "pip install 'dinocli[heic]'" and extra_for(".jpg") is None


def test_a_missing_package_is_not_installed() -> None:
    assert not Extra("none", "no_package_of_this_name", frozenset()).installed
    assert Extra("numpy", "numpy", frozenset()).installed


@pytest.mark.parametrize("module", ["dinocli.data.sources.open", "dinocli.data.decode.image"])
def test_no_optional_package_is_imported_before_it_is_needed(module: str) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {extra.package for extra in EXTRAS} & set(loaded)
