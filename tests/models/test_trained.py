from __future__ import annotations

import copy

import pytest
import torch
from conftest import assert_same_features
from pydantic import ValidationError

from dinocli.core.errors import DinoError
from dinocli.models.architecture import BackboneConfig
from dinocli.models.backbone import Backbone
from dinocli.models.trained import LowRank, TrainAll, TrainLast, TrainLora, effective_weights, train_only

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
ROTARY = VIT | {"num_reg_tokens": 2}
NAMES = {
    "vit_tiny_patch16_224": VIT,
    "vit_small_patch16_dinov3_qkvb": ROTARY,
    "vit_small_plus_patch16_dinov3_qkvb": ROTARY,
    # Their attention reads the weight of `qkv`, and does not call the layer.
    "beit_base_patch16_224": VIT,
    "eva02_tiny_patch14_224": VIT,
    "eva02_base_patch14_224": VIT,  # queries, keys, values and a gated MLP apart
}


def build(name: str = "vit_tiny_patch16_224") -> Backbone:
    torch.manual_seed(0)
    return BackboneConfig(name=name, options=NAMES[name], positions="dino").build(drop_path=False)


def trainable(backbone: Backbone) -> set[str]:
    return {name for name, parameter in backbone.model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("name", NAMES)
def test_lora_changes_nothing_at_first(name: str) -> None:
    plain = build(name)
    adapted = copy.deepcopy(plain)
    train_only(adapted, TrainLora(kind="lora", rank=4))
    images = torch.randn(2, 3, 32, 32)
    assert_same_features(adapted(images).cls, plain(images).cls)
    for ours, theirs in zip(effective_weights(adapted, plain), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_rank_beyond_that_of_the_layers_is_an_error_with_a_valid_rank() -> None:
    backbone = build()
    most = min(min(m.weight.shape) for n, m in backbone.named_modules() if n.endswith(("attn.qkv", "mlp.fc1")))
    with pytest.raises(DinoError, match=f"rank is {most + 1}; .* a rank of at most {most}") as error:
        train_only(backbone, TrainLora(kind="lora", rank=most + 1))
    assert error.value.hint == f"--set backbone.learning.trained.rank={min(16, most)}"
    train_only(backbone, TrainLora(kind="lora", rank=most))
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        TrainLora(kind="lora", rank=0)


@pytest.mark.parametrize("name", NAMES)
def test_only_the_additions_are_trained_and_all_get_a_gradient(name: str) -> None:
    backbone = build(name)
    count = sum(parameter.numel() for parameter in backbone.parameters())
    train_only(backbone, TrainLora(kind="lora", rank=4))
    additions = [module for module in backbone.modules() if isinstance(module, LowRank)]
    layers = {"vit_small_plus_patch16_dinov3_qkvb": 4, "eva02_base_patch14_224": 6}
    assert len(additions) == 3 * layers.get(name, 3)
    for addition in additions:
        torch.nn.init.normal_(addition.b, std=0.02)
    backbone(torch.randn(2, 3, 32, 32)).patches.square().sum().backward()
    for name, parameter in backbone.named_parameters():
        assert parameter.requires_grad == name.endswith((".0.a", ".0.b"))
        assert (parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)) == parameter.requires_grad, name
    trained = sum(parameter.numel() for parameter in backbone.parameters() if parameter.requires_grad)
    assert sum(parameter.numel() for parameter in backbone.parameters()) == count + trained


@pytest.mark.parametrize("alpha", [None, 8.0])
def test_the_weight_is_the_fixed_one_and_the_scaled_product(alpha: float | None) -> None:
    backbone = build()
    fixed = backbone.model.blocks[1].attn.qkv.weight.detach().double().clone()
    train_only(backbone, TrainLora(kind="lora", rank=4, alpha=alpha))
    layer = backbone.model.blocks[1].attn.qkv
    (addition,) = layer.parametrizations.weight
    torch.nn.init.normal_(addition.b)
    expected = fixed + (1 if alpha is None else alpha / 4) * addition.b.double() @ addition.a.double()
    torch.testing.assert_close(layer.weight.double(), expected, rtol=1e-5, atol=1e-5)


def test_effective_weights_are_those_of_a_plain_network_with_the_same_output() -> None:
    plain, adapted = build(), build()
    train_only(adapted, TrainLora(kind="lora", rank=4))
    for module in adapted.modules():
        if isinstance(module, LowRank):
            torch.nn.init.normal_(module.b, std=0.1)
    with torch.no_grad():
        for own, merged in zip(plain.parameters(), effective_weights(adapted, plain), strict=True):
            own.copy_(merged)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(plain(images).cls, adapted(images).cls)


def test_effective_weights_of_a_plain_network_are_its_parameters() -> None:
    plain = build()
    assert all(a is b for a, b in zip(effective_weights(plain, plain), plain.parameters(), strict=True))


def test_the_last_blocks_and_the_final_norm_are_trained() -> None:
    backbone = build()
    train_only(backbone, TrainLast(kind="last", blocks=1))
    assert {name.split(".")[0] for name in trainable(backbone)} == {"blocks", "norm"}
    assert {name.split(".")[1] for name in trainable(backbone) if name.startswith("blocks.")} == {"2"}


def test_all_weights_stay_trained_by_default() -> None:
    backbone = build()
    train_only(backbone, TrainAll(kind="all"))
    assert trainable(backbone) == {name for name, _ in backbone.model.named_parameters()}


def test_too_many_last_blocks_are_refused() -> None:
    with pytest.raises(DinoError, match=r"trained\.blocks is 4; VisionTransformer has 3 blocks") as error:
        train_only(build(), TrainLast(kind="last", blocks=4))
    assert error.value.hint == "--set backbone.learning.trained.blocks=1"


def test_lora_on_a_convolutional_network_is_refused() -> None:
    resnet = BackboneConfig(name="resnet18").build(drop_path=False)
    with pytest.raises(DinoError, match="needs a transformer with blocks; ResNet has none") as error:
        train_only(resnet, TrainLora(kind="lora"))
    assert "--train all" in error.value.hint
