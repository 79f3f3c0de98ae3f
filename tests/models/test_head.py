from __future__ import annotations

import plain
import pytest
import torch
from conftest import PRECISIONS, assert_original

from dinocli.models.head import HeadConfig


@PRECISIONS
@pytest.mark.parametrize("case", ["micro_f64", "micro_nonorm_f64"])
def test_output_equals_the_originals(original, case: str, dtype: torch.dtype) -> None:
    made, stored = original.made["head"][case], original.below(f"head/{case}/")
    head = HeadConfig(
        prototypes=made["out_dim"],
        hidden=made["hidden_dim"],
        bottleneck=made["bottleneck_dim"],
        layers=3,
        norm_last_layer=made.get("norm_last_layer", True),
    ).build(made["in_dim"])
    head = head.double()  # the stored weights are float64
    weights = {k.removeprefix("weights/"): v for k, v in stored.items() if k.startswith("weights/")}
    head.load_state_dict(weights)
    assert head.last_layer.weight_g.requires_grad == made["weight_g_requires_grad"]
    assert_original(head.to(dtype)(stored["input"].to(dtype)), stored["output"])
    assert_original(plain.head(weights, stored["input"], layers=3, batch_norm=False), stored["output"], "reference")


@PRECISIONS
@pytest.mark.parametrize("layers", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("norm_last_layer", [False, True])
def test_heads_of_any_shape_equal_the_reference_implementation(
    layers: int, batch_norm: bool, norm_last_layer: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    config = HeadConfig(
        prototypes=24, hidden=20, bottleneck=8, layers=layers, batch_norm=batch_norm, norm_last_layer=norm_last_layer
    )
    head = config.build(12).to(dtype)
    for parameter in head.parameters():  # initial ones and zeros would hide a missing scale or shift
        parameter.data.copy_(torch.randn_like(parameter) / 2)
    features = torch.randn(9, 12, dtype=dtype)
    weights = {k: v.double() for k, v in head.state_dict().items()}
    expected = plain.head(weights, features.double(), layers=layers, batch_norm=batch_norm)
    assert_original(head(features), expected)


def test_logits_are_cosines_if_norms_are_fixed() -> None:
    head = HeadConfig(prototypes=50, hidden=16, bottleneck=8, layers=2, norm_last_layer=True).build(12)
    logits = head(torch.randn(100, 12) * 1e3)
    assert logits.abs().max() <= 1 + 1e-6
    assert [n for n, p in head.named_parameters() if not p.requires_grad] == ["last_layer.weight_g"]


def test_initial_weights() -> None:
    head = HeadConfig(prototypes=4096, hidden=512, bottleneck=256, layers=3, norm_last_layer=True).build(384)
    assert head.mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert head.mlp[0].bias.eq(0).all()
    assert head.last_layer.weight_v.std().item() == pytest.approx(1 / 16 / 3**0.5, rel=0.02)
    assert head.last_layer.weight_g.eq(1).all()


@pytest.mark.parametrize(
    ("layers", "keys"),
    [(1, ["mlp.bias", "mlp.weight"]), (2, ["mlp.0.bias", "mlp.0.weight", "mlp.2.bias", "mlp.2.weight"])],
)
def test_weight_keys_equal_the_originals(layers: int, keys: list[str]) -> None:
    head = HeadConfig(prototypes=4, hidden=6, bottleneck=5, layers=layers, norm_last_layer=False).build(3)
    assert sorted(head.state_dict()) == ["last_layer.weight_g", "last_layer.weight_v", *keys]


def test_batch_norm_precedes_each_gelu() -> None:
    head = HeadConfig(prototypes=4, hidden=6, bottleneck=5, layers=3, batch_norm=True, norm_last_layer=True).build(3)
    assert [type(m).__name__ for m in head.mlp] == [
        "Linear",
        "BatchNorm1d",
        "GELU",
        "Linear",
        "BatchNorm1d",
        "GELU",
        "Linear",
    ]


def test_a_head_without_prototypes_ends_in_unit_features() -> None:
    torch.manual_seed(0)
    config = HeadConfig(hidden=6, bottleneck=5, layers=3)
    head = config.build(3)
    assert config.outputs == head.outputs == 5
    assert sorted(head.state_dict()) == [f"mlp.{i}.{key}" for i in (0, 2, 4) for key in ("bias", "weight")]
    features = torch.randn(7, 3)
    torch.testing.assert_close(head(features), torch.nn.functional.normalize(head.mlp(features), dim=-1))
