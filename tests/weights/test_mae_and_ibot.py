"""ViT files of iBOT and MAE, whose keys are DINO's apart from the mask token and MAE's decoder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from random_weights import fill, largest_difference
from torch import Tensor

from dinocli.core.errors import DinoError
from dinocli.weights.checkpoint import read_weights
from dinocli.weights.load import load_encoder

CPU = torch.device("cpu")


def mae() -> tuple[transformers.ViTMAEModel, dict[str, Tensor]]:
    """Return MAE's encoder in transformers, and its weights under the keys of facebookresearch/mae."""
    config = transformers.ViTMAEConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=1,
        intermediate_size=256,
        image_size=64,
        mask_ratio=0.0,
        layer_norm_eps=1e-6,
    )
    model = transformers.ViTMAEModel(config).eval()
    fixed = model.embeddings.position_embeddings.clone()
    fill(model)
    model.embeddings.position_embeddings.data.copy_(fixed)
    weights: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        key = re.sub(r"^(?:encoder\.)?layers?\.(\d+)\.", r"blocks.\1.", key)
        for theirs, mae_key in (
            ("embeddings.cls_token", "cls_token"),
            ("embeddings.position_embeddings", "pos_embed"),
            ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
            ("layernorm_before", "norm1"),
            ("layernorm_after", "norm2"),
            ("attention.output.dense", "attn.proj"),
            ("attention.o_proj", "attn.proj"),
            ("attention.attention.", "attention."),
            ("intermediate.dense", "mlp.fc1"),
            ("mlp.up_proj", "mlp.fc1"),
            ("mlp.down_proj", "mlp.fc2"),
        ):
            key = key.replace(theirs, mae_key)
        key = re.sub(r"^(blocks\.\d+)\.output\.dense", r"\1.mlp.fc2", key)
        key = re.sub(r"attention\.(query|key|value|q_proj|k_proj|v_proj)\.", lambda m: f"attn.{m[1][0]}.", key)
        weights[re.sub(r"^layernorm\.", "norm.", key)] = value.clone()
    for key in [key for key in weights if ".attn.q." in key]:
        parts = [weights.pop(key.replace(".q.", f".{letter}.")) for letter in "qkv"]
        weights[key.replace(".q.", ".qkv.")] = torch.cat(parts)
    return model, weights


@pytest.mark.parametrize("size", [(64, 64), (96, 48)])
@pytest.mark.parametrize("with_decoder", [False, True])
def test_a_mae_file_gives_the_features_of_transformers(
    with_decoder: bool, size: tuple[int, int], tmp_path: Path
) -> None:
    model, weights = mae()
    decoder = {"mask_token": torch.ones(1, 1, 32), "decoder_embed.weight": torch.ones(32, 64)} if with_decoder else {}
    torch.save({"model": weights | decoder}, tmp_path / "mae_pretrain_vit_base.pth")
    encoder = load_encoder(str(tmp_path / "mae_pretrain_vit_base.pth"), CPU)
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        order = torch.arange(size[0] * size[1] // 256, dtype=torch.float32).expand(2, -1)
        theirs = model(images, noise=order, interpolate_pos_encoding=True).last_hidden_state
        ours = encoder.backbone(images)
    assert largest_difference(ours.cls, theirs[:, 0]) < 1e-5
    assert largest_difference(ours.patches, theirs[:, 1:]) < 1e-5
    assert read_weights(tmp_path / "mae_pretrain_vit_base.pth").mask_token is None


def ibot() -> tuple[timm.models.VisionTransformer, dict[str, Tensor]]:
    """Return timm's ViT, and its weights as iBOT saves them: `masked_embed` instead of a mask token."""
    model = timm.create_model("vit_small_patch16_224", depth=2, img_size=64, num_classes=0, dynamic_img_size=True)
    fill(model)
    token = torch.randn(1, 384, generator=torch.Generator().manual_seed(3))
    return model.eval(), {key: value.clone() for key, value in model.state_dict().items()} | {"masked_embed": token}


@pytest.mark.parametrize("size", [(64, 64), (96, 48), (32, 112)])
def test_an_ibot_file_gives_the_features_of_timms_vit_with_dinos_positions(
    size: tuple[int, int], tmp_path: Path
) -> None:
    """iBOT interpolates positions as DINO does. Its own code gave the same features at these sizes, to 6e-6."""
    model, weights = ibot()
    torch.save({"state_dict": weights}, tmp_path / "checkpoint_teacher.pth")
    encoder = load_encoder(str(tmp_path / "checkpoint_teacher.pth"), CPU)
    rows, columns = (side // 16 for side in size)
    table = model.pos_embed[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    if (rows, columns) != (4, 4):
        scale = ((rows + 0.1) / 4, (columns + 0.1) / 4)
        table = F.interpolate(table, scale_factor=scale, mode="bicubic")
    assert table.shape[-2:] == (rows, columns)
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        patches = model.patch_embed.proj(images) + table
        first = (model.cls_token + model.pos_embed[:, :1]).expand(2, -1, -1)
        theirs = model.norm(model.blocks(torch.cat([first, patches.flatten(2).transpose(1, 2)], 1)))
        ours = encoder.backbone(images)
    assert largest_difference(ours.cls, theirs[:, 0]) < 1e-5
    assert largest_difference(ours.patches, theirs[:, 1:]) < 1e-5
    token = read_weights(tmp_path / "checkpoint_teacher.pth").mask_token
    assert token is not None
    torch.testing.assert_close(token, weights["masked_embed"])


def test_a_missing_key_is_an_error_that_names_it(tmp_path: Path) -> None:
    weights = mae()[1]
    del weights["blocks.1.norm2.bias"]
    torch.save({"model": weights}, tmp_path / "x.pth")
    with pytest.raises(DinoError, match=r"blocks\.1\.norm2\.bias is missing"):
        load_encoder(str(tmp_path / "x.pth"), CPU)
