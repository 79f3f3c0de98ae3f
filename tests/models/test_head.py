from __future__ import annotations

import pytest
import torch

from dinocli.models.head import HeadConfig


def config_of(made: dict) -> HeadConfig:
    return HeadConfig(
        prototypes=made["out_dim"],
        hidden=made["hidden_dim"],
        bottleneck=made["bottleneck_dim"],
        layers=3,
        norm_last_layer=made.get("norm_last_layer", True),
    )


@pytest.mark.parametrize("case", ["micro_f64", "micro_nonorm_f64"])
def test_output_and_gradients_equal_the_originals(original, case: str) -> None:
    made, stored = original.made["head"][case], original.below(f"head/{case}/")
    head = config_of(made).build(made["in_dim"]).double()
    weights = {k.removeprefix("weights/"): v for k, v in stored.items() if k.startswith("weights/")}
    head.load_state_dict(weights)
    assert head.last_layer.weight_g.requires_grad == made["weight_g_requires_grad"]
    features = stored["input"].requires_grad_()
    output = head(features)
    torch.testing.assert_close(output, stored["output"], rtol=1e-12, atol=1e-14)


def test_logits_are_cosines_while_norms_are_kept() -> None:
    head = HeadConfig(prototypes=50, hidden=16, bottleneck=8, layers=2, norm_last_layer=True).build(12)
    logits = head(torch.randn(100, 12) * 1e3)
    assert logits.abs().max() <= 1 + 1e-6
    assert [n for n, p in head.named_parameters() if not p.requires_grad] == ["last_layer.weight_g"]


def test_start_of_the_weights() -> None:
    head = HeadConfig(prototypes=4096, hidden=512, bottleneck=256, layers=3, norm_last_layer=True).build(384)
    assert head.mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert head.mlp[0].bias.eq(0).all()
    assert head.last_layer.weight_v.std().item() == pytest.approx(1 / 16 / 3**0.5, rel=0.02)
    assert head.last_layer.weight_g.eq(1).all()


@pytest.mark.parametrize(
    ("layers", "keys"),
    [(1, ["mlp.bias", "mlp.weight"]), (2, ["mlp.0.bias", "mlp.0.weight", "mlp.2.bias", "mlp.2.weight"])],
)
def test_keys_are_the_originals(layers: int, keys: list[str]) -> None:
    head = HeadConfig(prototypes=4, hidden=6, bottleneck=5, layers=layers, norm_last_layer=False).build(3)
    assert sorted(head.state_dict()) == ["last_layer.weight_g", "last_layer.weight_v", *keys]


def test_batch_norm_stands_before_each_gelu() -> None:
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
