from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from dinocli.models import attention_kernels as module
from dinocli.models import block
from dinocli.models.architecture import BackboneConfig
from dinocli.models.attention_kernels import Shape, choose_kernels, measure
from dinocli.models.transformer import Transformer

CPU = torch.device("cpu")


def small(**options: Any) -> Transformer:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    backbone = BackboneConfig(name="vit_tiny_patch16_224", options=sizes | options).build(drop_path=False)
    assert isinstance(backbone, Transformer)
    return backbone


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Shape]:
    """Replace the measurement: few tokens are fastest with one kernel, many with another. Return what was measured."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    shapes: list[Shape] = []

    def fake(shape: Shape, *_: object) -> dict[SDPBackend, float]:
        shapes.append(shape)
        quick = SDPBackend.CUDNN_ATTENTION if shape.tokens > 10 else SDPBackend.EFFICIENT_ATTENTION
        return {SDPBackend.MATH: 2.0, quick: 1.0}

    monkeypatch.setattr(module, "measure", fake)
    return shapes


def test_each_number_of_tokens_gets_the_fastest_kernel_first(
    asked: list[Shape], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, orders = small(), []
    assert choose_kernels([backbone], [(6, 32), (4, 16)], CPU, torch.float32) == {17: "cudnn", 5: "efficient"}
    assert asked == [Shape(6, 2, 17, 8), Shape(4, 2, 5, 8)]
    monkeypatch.setattr(
        block, "sdpa_kernel", lambda order, **options: orders.append((order, options)) or sdpa_kernel(order, **options)
    )
    for side, first in ((32, SDPBackend.CUDNN_ATTENTION), (16, SDPBackend.EFFICIENT_ATTENTION)):
        orders.clear()
        backbone(torch.randn(2, 3, side, side))
        assert len(orders) == 2, "two blocks"
        for order, options in orders:
            assert order[0] == first and set(order) == set(module._KERNELS) and options == {"set_priority": True}
    orders.clear()
    backbone(torch.randn(2, 3, 24, 24))
    assert not orders, "a size that was not measured is left to torch"


def test_a_measurement_is_kept_for_later_runs(asked: list[Shape], tmp_path: Path) -> None:
    for _ in range(2):
        assert choose_kernels([small(), small()], [(6, 32)], CPU, torch.float32) == {17: "cudnn"}
    assert len(asked) == 1
    choose_kernels([small()], [(6, 32)], CPU, torch.bfloat16)
    choose_kernels([small()], [(7, 32)], CPU, torch.float32)
    assert len(asked) == 3, "another precision or batch is another measurement"
    place = tmp_path / "dinocli/attention.json"
    kept = json.loads(place.read_text())
    assert [value for key, value in kept.items() if torch.__version__ in key] == ["CUDNN_ATTENTION"] * 3
    for damage in ("{", "[1]", '{"a": "b"}'):
        place.write_text(damage)
        assert choose_kernels([small()], [(6, 32)], CPU, torch.float32) == {17: "cudnn"}


def test_registers_count_as_tokens_and_other_networks_are_left_alone(asked: list[Shape]) -> None:
    assert choose_kernels([small(reg_tokens=4)], [(2, 16)], CPU, torch.float32) == {9: "efficient"}
    convolutional = BackboneConfig(name="resnet18").build(drop_path=False)
    assert choose_kernels([convolutional], [(2, 32)], CPU, torch.float32) == {}


def test_the_choice_changes_neither_features_nor_compiled_graphs(asked: list[Shape]) -> None:
    backbone, images = small(), torch.randn(2, 3, 32, 32)
    plain = backbone(images).cls
    choose_kernels([backbone], [(6, 32)], CPU, torch.float32)
    torch.testing.assert_close(backbone(images).cls, plain)
    explained = torch._dynamo.explain(backbone.blocks[0])(torch.randn(2, 17, 16))
    assert explained.graph_break_count == 0


def test_only_kernels_that_run_here_are_measured() -> None:
    seconds = measure(Shape(2, 2, 9, 8), CPU, torch.float32)
    assert set(seconds) == {SDPBackend.FLASH_ATTENTION, SDPBackend.MATH}
    assert all(0 < each < 10 for each in seconds.values())


@pytest.mark.gpu
def test_the_order_decides_which_kernel_of_a_gpu_runs() -> None:
    q = torch.randn(2, 4, 37, 64, device="cuda", dtype=torch.bfloat16)
    expected = torch.nn.functional.scaled_dot_product_attention(q.float(), q.float(), q.float())
    for kernel in measure(Shape(2, 4, 37, 64), q.device, q.dtype):
        order = [kernel, *(other for other in module._KERNELS if other != kernel)]
        with sdpa_kernel(order, set_priority=True):
            assert torch._fused_sdp_choice(q, q, q) == kernel.value
            made = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        torch.testing.assert_close(made.float(), expected, atol=0.02, rtol=0.02)
