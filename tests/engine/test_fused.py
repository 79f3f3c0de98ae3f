"""Triton's kernels in its interpreter, on the CPU."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dinocli.core import foreach
from dinocli.engine.graph import GraphTrainer
from dinocli.engine.method import Method, ParamGroup
from dinocli.engine.optim import (
    AdamWConfig,
    Clip,
    ClipEach,
    ClipModules,
    clip_gradients,
    drop_frozen,
    set_rates,
    step_unless_skipped,
)
from dinocli.engine.schedules import Clock, Cosine
from dinocli.engine.trainer import Trainer

RATES = {"lr": Cosine(kind="cosine", start=0.1, end=0.0), "weight_decay": Cosine(kind="cosine", start=0.1, end=0.5)}
CLIPS = [ClipEach(kind="each_parameter", norm=0.5), ClipModules(kind="each_module", norm=1.0), None]


# Triton's own functions are interpreted or compiled as the environment says when Triton is imported.
interpreted = pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="runs in the process of the first test")


def test_kernels_are_those_of_torch_in_a_process_with_the_interpreter() -> None:
    pytest.importorskip("triton")
    if "TRITON_INTERPRET" not in os.environ:
        words = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", "-p", "no:cacheprovider", __file__]
        done = subprocess.run(words, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
        assert "10 passed, 6 skipped, 3 deselected" in done.stdout


def test_without_a_device_the_kernels_give_their_error() -> None:
    pytest.importorskip("triton")
    if "TRITON_INTERPRET" in os.environ:
        pytest.skip("interpreted kernels run anywhere")
    from dinocli.engine import fused

    assert fused.why_not(torch.device("cpu"))


KINDS = {"sums": "*fp32", "norms": "*fp32", "steps": "*fp32", "weight": "*fp32", "done": "*i1", "count": "i32"}
KINDS |= dict.fromkeys(("scales", "decays", "lr", "weight_decay"), "*fp64")
KINDS |= dict.fromkeys(("tensors", "owners", "firsts"), "*i32")
KINDS |= dict.fromkeys(("gradients", "state", "table", "starts", "sizes"), "*i64")
CONSTANTS = {"CHUNK": 4096, "WIDTH": 256, "BETA1": 0.9, "BETA2": 0.999, "LOG1": -0.15, "LOG2": -0.0014, "EPS": 1e-8}


@pytest.mark.parametrize("name", ["_sum_squares", "_find_norms", "_adamw", "_count_steps", "_move"])
def test_kernels_compile_for_a_gpu(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's compiler needs no GPU, and accepts less than its interpreter."""
    triton = pytest.importorskip("triton")
    if "TRITON_INTERPRET" in os.environ:
        pytest.skip("nothing is compiled here")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dinocli.engine import fused

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(fused, name)
    constants = {n: (CONSTANTS | {"CLIP": 3.0})[n] for n in kernel.arg_names if n.isupper()}
    source = ASTSource(kernel, {n: KINDS.get(n, "constexpr") for n in kernel.arg_names}, constants)
    assert triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["ptx"]


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Any:
    from dinocli.engine import fused

    monkeypatch.setattr(fused, "_CHUNK", 16)  # so that tensors have several chunks
    return fused


def config_of(clip: Clip | None) -> AdamWConfig:
    return AdamWConfig(kind="adamw", betas=(0.9, 0.999), clip=clip, **RATES)


def groups(device: str = "cpu") -> list[ParamGroup]:
    """Four parameters in three groups and two modules; one parameter never has a gradient."""
    torch.manual_seed(0)
    a, b, c, d = (nn.Parameter(torch.randn(shape).to(device)) for shape in ((5, 7), (16,), (3, 2, 3), (4,)))
    return [
        ParamGroup([a, d], modules=["backbone", "backbone"]),
        ParamGroup([b], decay=False, lr_scale=0.5, modules=["head"]),
        ParamGroup([c], frozen_epochs=2, modules=["head"]),
    ]


@interpreted
@pytest.mark.parametrize("clip", CLIPS, ids=["each parameter", "each module", "none"])
def test_steps_are_those_of_torch(fused: Any, clip: Clip | None) -> None:
    compare_steps(fused, clip, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("clip", CLIPS, ids=["each parameter", "each module", "none"])
def test_steps_on_a_gpu_are_those_of_torch(fused: Any, clip: Clip | None) -> None:
    compare_steps(fused, clip, "cuda")


def compare_steps(fused: Any, clip: Clip | None, device: str) -> None:
    """Compare six steps: the first two with a frozen group, the fourth one skipped."""
    config = config_of(clip)
    one, other = (config.build(groups(device)) for _ in range(2))
    update = fused.FusedAdamW(other, config)
    for step in range(6):
        clock, done = Clock(1, 6, step), torch.tensor(step != 3, device=device)
        for optimizer in (one, other):
            torch.manual_seed(step)
            for p in (p for group in optimizer.param_groups for p in group["params"] if p.shape != (4,)):
                p.grad = torch.randn(p.shape).to(device)
        rates = config.lr.at(clock), config.weight_decay.at(clock)
        set_rates(one, *rates)
        expected, norm = clip_gradients(one, config.clip), update.clip()
        torch.testing.assert_close(norm, expected)
        for optimizer in (one, other):
            drop_frozen(optimizer, clock)
        step_unless_skipped(one, done)
        update.step(*(torch.tensor(rate, dtype=torch.float64, device=device) for rate in rates), done)
        pairs = zip(*([p for group in o.param_groups for p in group["params"]] for o in (one, other)), strict=True)
        for mine, new in pairs:
            assert new.grad is None
            torch.testing.assert_close(new, mine, rtol=1e-5, atol=1e-6, msg=f"step {step}")
            for name, slot in one.state[mine].items():
                torch.testing.assert_close(other.state[new][name], slot, rtol=1e-5, atol=1e-6, msg=f"{step} {name}")
    counts = [int(other.state[p]["step"]) for group in other.param_groups for p in group["params"]]
    assert counts == [5, 0, 5, 3]


@interpreted
@pytest.mark.parametrize("weight", [0.0, 0.004, 0.7, 1.0])
def test_averages_move_like_those_of_torch(fused: Any, weight: float) -> None:
    torch.manual_seed(0)
    own, towards = ([nn.Parameter(torch.randn(shape)) for shape in ((5, 7), (16,), ())] for _ in range(2))
    expected, move = copy.deepcopy(own), fused.Mover()
    with torch.no_grad():
        for _ in range(2):
            foreach.move(expected, towards, torch.tensor(weight))
            move(own, towards, torch.tensor(weight))
        made = [p * 1 for p in own]  # as merged low-rank weights are, at new addresses in every step
        move(made, own, torch.tensor(1.0))
    for mine, right in zip(own, expected, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-6, atol=1e-7)


class Line(Method):
    """Method that fits a line."""

    def __init__(self) -> None:
        super().__init__()
        self.groups = groups()
        self.parameters_ = nn.ParameterList(p for group in self.groups for p in group.params)

    def forward(self, part: Tensor) -> dict[str, Tensor]:
        return {"near": sum((p.mean() - part.mean()).square() for p in self.parameters_)}  # type: ignore[dict-item]

    def param_groups(self) -> list[ParamGroup]:
        return self.groups


@interpreted
def test_a_trainer_of_graphs_uses_it(fused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("Stream", "graph_pool_handle", "current_stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: nullcontext())
    monkeypatch.setattr(GraphTrainer, "_run_beside", Trainer._run)
    monkeypatch.setattr(GraphTrainer, "_fuse", lambda self: fused.FusedAdamW(self.optimizer, self.config))
    trainers = [
        kind(Line(), config_of(CLIPS[0]), Clock(1, 3), batch_size=1, guarded=True) for kind in (Trainer, GraphTrainer)
    ]
    for step in range(3):
        batch = torch.full((2,), float("nan") if step == 1 else float(step))
        plain, graphed = (trainer.step(batch) for trainer in trainers)
        torch.testing.assert_close(graphed["grad_norm"], plain["grad_norm"], equal_nan=True)
    plain, graphed = (trainer.method.state_dict() for trainer in trainers)
    torch.testing.assert_close(graphed, plain, rtol=1e-5, atol=1e-6)


@interpreted
def test_kernels_are_tried_on_the_device(fused: Any) -> None:
    assert fused.why_not(torch.device("cpu")) is None
