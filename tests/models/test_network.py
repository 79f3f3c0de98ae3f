from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dinocli.errors import DinoError
from dinocli.models.backbone import BackboneConfig
from dinocli.models.head import HeadConfig
from dinocli.models.network import Network

OPTIONS = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}


def small(prototypes: int = 12, batch_norm: bool = False) -> Network:
    backbone = BackboneConfig(name="vit_tiny_patch16_224", options=OPTIONS, positions="dino").build(drop_path=False)
    head = HeadConfig(
        prototypes=prototypes, hidden=20, bottleneck=8, layers=3, batch_norm=batch_norm, norm_last_layer=True
    )
    return Network(backbone, {"dino": head.build(16)})


def test_views_of_two_resolutions_come_out_in_their_order() -> None:
    network, large, local = small(), torch.randn(2, 3, 3, 16, 16), torch.randn(4, 3, 3, 8, 8)
    encoding = network([large, local])
    assert (encoding.cls.shape, encoding.logits["dino"].shape) == ((6, 3, 16), (6, 3, 12))
    torch.testing.assert_close(encoding.cls[1], network.backbone(large[1]).cls)
    torch.testing.assert_close(encoding.cls[5], network.backbone(local[3]).cls)
    torch.testing.assert_close(encoding.logits["dino"][5], network.heads["dino"](encoding.cls[5]))


def test_a_head_with_batch_norm_sees_all_views_at_once() -> None:
    network, calls = small(batch_norm=True), []
    network.heads["dino"].register_forward_pre_hook(lambda module, args: calls.append(args[0].shape))
    network([torch.randn(2, 3, 3, 16, 16), torch.randn(4, 3, 3, 8, 8)])
    assert calls == [(18, 16)]


def test_weights_go_out_and_in_under_timms_keys() -> None:
    one, other = small(), small()
    weights = one.weights()
    assert {"backbone.cls_token", "backbone.blocks.1.attn.qkv.weight", "heads.dino.last_layer.weight_v"} <= set(weights)
    other.load_weights(weights, "x")
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def changed(weights: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    if how == "missing":
        return {k: v for k, v in weights.items() if k != "backbone.norm.bias"}
    if how == "unknown":
        return weights | {"backbone.wings": torch.zeros(1)}
    return weights | {"backbone.norm.bias": torch.zeros(17)}


@pytest.mark.parametrize(
    ("how", "message"),
    [("missing", r"lacks .*norm\.bias"), ("unknown", "wings"), ("shape", r"norm\.bias should be 16; it is 17")],
)
def test_weights_that_do_not_fit_are_named_and_nothing_changes(how: str, message: str) -> None:
    network = small()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    with pytest.raises(DinoError, match=message):
        network.load_weights(changed(small().weights(), how), "x")
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
