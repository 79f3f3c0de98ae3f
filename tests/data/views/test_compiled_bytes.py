from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from byte_views import SIZES, WILD, in_bytes, some_crops
from torch._inductor.codecache import CppCodeCache

from dinocli.data.views import compiled_bytes
from dinocli.data.views.augment_bytes import normalize_bytes
from dinocli.data.views.compiled_bytes import compile_library, normalize_compiled
from dinocli.data.views.crops import NUMBERS, JitterConfig, ViewConfig, draws


@pytest.fixture
def library() -> str:
    if (found := compile_library()) is None:
        pytest.skip("no C++ compiler")
    return found


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_the_compiled_library_makes_the_same_bytes(channels: int, library: str) -> None:
    calm = JitterConfig(probability=1, brightness=1, contrast=1, saturation=0, hue=0)
    for size in SIZES:
        color = {"jitter": WILD, "gray": 0.2} if channels == 3 else {"jitter": calm}
        view = ViewConfig(size=size, scale=(0.25, 1.0), flip=0.5, blur=0.7, solarize=0.2, **color)
        drawn = draws(np.random.default_rng(size).random((60, 1, NUMBERS)), [view])
        crops = some_crops(size, images=60, channels=channels)
        assert torch.equal(in_bytes(crops, drawn, library), in_bytes(crops, drawn))


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_the_compiled_library_normalizes_to_the_same_numbers(channels: int, library: str) -> None:
    mean, std = torch.linspace(0.2, 0.6, channels), torch.linspace(0.1, 0.3, channels)
    views = torch.cat([some_crops(17, images=2, channels=channels)] * 3)
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16, 1).expand(1, 1, 16, 16, channels)
    for crops in (views, every, views[:, 1:]):
        made = normalize_compiled(crops, mean, std, library)
        assert torch.equal(made, normalize_bytes(crops, mean, std)) and made.is_contiguous()


def test_a_library_is_compiled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, library: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled: list[str] = []
    load = CppCodeCache.load
    monkeypatch.setattr(CppCodeCache, "load", lambda source: compiled.append(source) or load(source))
    first = compile_library()
    assert compile_library() == first and len(compiled) == 1 and first and Path(first).is_relative_to(tmp_path)
    monkeypatch.setattr(compiled_bytes, "_processor", lambda: "another")
    assert compile_library() not in (None, first) and len(compiled) == 2


def test_a_processor_is_told_by_its_instructions(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    kinds = []
    for flags in ("fpu avx2", "fpu avx2 avx512f"):
        core = "processor\t: {}\nmodel name\t: A\ncpu MHz\t\t: {}\nflags\t\t: " + flags + "\n\n"
        for megahertz in (2000, 3000):
            (tmp_path / "proc/cpuinfo").write_text(core.format(0, megahertz) + core.format(1, 2500))
            kinds.append(compiled_bytes._processor(tmp_path))
    assert kinds[0] == kinds[1] != kinds[2] == kinds[3]


def test_without_a_compiler_there_is_no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda command: None)
    assert compile_library() is None
    monkeypatch.setattr(shutil, "which", lambda command: f"/{command}")
    monkeypatch.setattr(CppCodeCache, "load", lambda source: 1 / 0)
    assert compile_library() is None and not list(tmp_path.rglob("*.so"))
