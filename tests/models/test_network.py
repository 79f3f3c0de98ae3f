from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dinocli.core.errors import DinoError
from dinocli.models.architecture import BackboneConfig
from dinocli.models.backbone import MaskedPatches
from dinocli.models.head import HeadConfig
from dinocli.models.network import Network

OPTIONS = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}


def make_network(prototypes: int = 12, batch_norm: bool = False) -> Network:
    backbone = BackboneConfig(name="vit_tiny_patch16_224", options=OPTIONS, positions="dino").build(drop_path=False)
    head = HeadConfig(
        prototypes=prototypes, hidden=20, bottleneck=8, layers=3, batch_norm=batch_norm, norm_last_layer=True
    )
    return Network(backbone, {"dino": head.build(16)})


def test_views_of_two_resolutions_are_encoded_in_order() -> None:
    network, large, local = make_network(), torch.randn(2, 3, 3, 16, 16), torch.randn(4, 3, 3, 8, 8)
    encoding = network([large, local])
    assert (encoding.cls.shape, encoding.class_logits["dino"].shape) == ((6, 3, 16), (6, 3, 12))
    torch.testing.assert_close(encoding.cls[1], network.backbone(large[1]).cls)
    torch.testing.assert_close(encoding.cls[5], network.backbone(local[3]).cls)
    torch.testing.assert_close(encoding.class_logits["dino"][5], network.heads["dino"](encoding.cls[5]))


def test_a_head_with_batch_norm_sees_all_views_at_once() -> None:
    network, calls = make_network(batch_norm=True), []
    network.heads["dino"].register_forward_pre_hook(lambda module, args: calls.append(args[0].shape))
    network([torch.randn(2, 3, 3, 16, 16), torch.randn(4, 3, 3, 8, 8)])
    assert calls == [(18, 16)]


BOTH = frozenset(["class", "patches"])


def make_reading_network(reads: dict[str, frozenset[str]], batch_norm: bool = False) -> Network:
    backbone = BackboneConfig(name="vit_tiny_patch16_224", options=OPTIONS, positions="dino").build(drop_path=False)
    config = HeadConfig(prototypes=12, hidden=20, bottleneck=8, layers=3, batch_norm=batch_norm, norm_last_layer=True)
    return Network(backbone, {name: config.build(16) for name in reads}, reads, masking=True)


def test_heads_read_class_tokens_patches_or_both() -> None:
    network = make_reading_network({"a": frozenset(["class"]), "b": frozenset(["patches"]), "c": BOTH})
    torch.nn.init.normal_(network.mask_token)
    large, local = torch.randn(2, 3, 3, 16, 16), torch.randn(4, 3, 3, 8, 8)
    mask = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    rows = mask.flatten().nonzero().flatten()
    encoding = network([large, local], mask, rows)
    assert {name: logits.shape for name, logits in encoding.class_logits.items()} == {"a": (6, 3, 12), "c": (6, 3, 12)}
    assert {name: logits.shape for name, logits in encoding.masked_logits.items()} == {
        "b": (len(rows), 12),
        "c": (len(rows), 12),
    }
    assert encoding.globals == 2
    tokens = network.backbone(large.flatten(0, 1), MaskedPatches(mask.flatten(0, 1), network.mask_token))
    torch.testing.assert_close(encoding.cls[:2].flatten(0, 1), tokens.cls)
    patches = tokens.patches.flatten(0, 1)[rows]
    for name in ("b", "c"):
        torch.testing.assert_close(encoding.masked_logits[name], network.heads[name](patches))
    for name in ("a", "c"):
        torch.testing.assert_close(encoding.class_logits[name][5], network.heads[name](network.backbone(local[3]).cls))
    unmasked = network([large])  # like a teacher, and with the logits of all patches
    torch.testing.assert_close(
        unmasked.masked_logits["b"][:4], network.heads["b"](network.backbone(large[0, :1]).patches[0])
    )


def test_the_mlp_of_a_shared_head_runs_once() -> None:
    network, calls = make_reading_network({"a": BOTH}, batch_norm=True), []
    network.heads["a"].mlp.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape))
    network([torch.randn(2, 3, 3, 16, 16), torch.randn(4, 3, 3, 8, 8)], None, torch.tensor([1, 5, 23]))
    assert calls == [(18 + 3, 16)]


def test_both_outputs_of_a_shared_head_can_be_overwritten() -> None:
    network = make_reading_network({"a": BOTH})
    encoding = network([torch.randn(2, 3, 3, 16, 16)], None, torch.tensor([1, 5]))
    with torch.no_grad():
        encoding.class_logits["a"].zero_()
        encoding.masked_logits["a"].zero_()
    (encoding.class_logits["a"].sum() + encoding.masked_logits["a"].sum()).backward()
    assert network.heads["a"].last_layer.weight_v.grad.any()


def test_the_mask_token_is_among_the_weights() -> None:
    network = make_reading_network({"a": BOTH})
    assert torch.equal(network.weights()["mask_token"], torch.zeros(1, 16))
    assert "mask_token" not in make_network().weights()


def test_weights_are_returned_and_loaded_under_timms_keys() -> None:
    one, other = make_network(), make_network()
    weights = one.weights()
    assert {"backbone.cls_token", "backbone.blocks.1.attn.qkv.weight", "heads.dino.last_layer.weight_v"} <= set(weights)
    other.load_weights(weights, "x")
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def change_weights(weights: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    if how == "missing":
        return {k: v for k, v in weights.items() if k != "backbone.norm.bias"}
    if how == "unknown":
        return weights | {"backbone.no_such_key": torch.zeros(1)}
    return weights | {"backbone.norm.bias": torch.zeros(17)}


@pytest.mark.parametrize(
    ("how", "message"),
    [("missing", r"norm\.bias is missing"), ("unknown", "no_such_key"), ("shape", r"norm\.bias is 17; expected 16")],
)
def test_weights_that_do_not_fit_are_refused_and_nothing_changes(how: str, message: str) -> None:
    network = make_network()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    with pytest.raises(DinoError, match=message):
        network.load_weights(change_weights(make_network().weights(), how), "x")
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
