from __future__ import annotations

import json
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import transformers
from random_weights import fill, largest_difference
from safetensors.torch import save_file
from torch import Tensor

from dinocli.core.errors import DinoError
from dinocli.method.preset import load_preset
from dinocli.weights.load import load_encoder, start_from

CPU = torch.device("cpu")
WEB, SATELLITE = (0.485, 0.456, 0.406), (0.430, 0.411, 0.296)


def vision_transformer(**options: object) -> transformers.DINOv3ViTModel:
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    model = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**shape | {"num_register_tokens": 4} | options))
    fill(model)
    return model.eval()


def released(model: transformers.DINOv3ViTModel) -> dict[str, Tensor]:
    """Return weights of transformers under the keys of facebookresearch/dinov3, with all that its files hold."""
    own, width = model.state_dict(), model.config.hidden_size
    gated, quarter = model.config.use_gated_mlp, width // model.config.num_attention_heads // 4
    weights = {
        "cls_token": own["embeddings.cls_token"],
        "storage_tokens": own["embeddings.register_tokens"],
        "mask_token": own["embeddings.mask_token"][0],
        "patch_embed.proj.weight": own["embeddings.patch_embeddings.weight"],
        "patch_embed.proj.bias": own["embeddings.patch_embeddings.bias"],
        # The released files were rounded to bfloat16.
        "rope_embed.periods": (100 ** (torch.arange(quarter) / quarter)).bfloat16().float(),
        "norm.weight": own["norm.weight"],
        "norm.bias": own["norm.bias"],
    }
    for i in range(model.config.num_hidden_layers):
        prefix = next(key for key in own if re.search(rf"layer\.{i}\.norm1\.weight", key)).removesuffix("norm1.weight")
        layer = {key.removeprefix(prefix): value for key, value in own.items() if key.startswith(prefix)}
        q, k, v = (layer[f"attention.{letter}_proj.weight"] for letter in "qkv")
        block = {"attn.qkv.weight": torch.cat([q, k, v])}
        if "attention.q_proj.bias" in layer:
            q, v = layer["attention.q_proj.bias"], layer["attention.v_proj.bias"]
            # The file may hold any bias of keys; its mask removes it.
            block["attn.qkv.bias"] = torch.cat([q, torch.ones_like(q), v])
            block["attn.qkv.bias_mask"] = torch.cat([torch.ones_like(q), torch.zeros_like(q), torch.ones_like(v)])
        names = ("w1", "w2", "w3") if gated else ("fc1", "fc2")
        theirs = ("gate_proj", "up_proj", "down_proj") if gated else ("up_proj", "down_proj")
        for kind in ("weight", "bias"):
            block[f"attn.proj.{kind}"] = layer[f"attention.o_proj.{kind}"]
            block |= {f"norm{n}.{kind}": layer[f"norm{n}.{kind}"] for n in (1, 2)}
            block |= {f"mlp.{a}.{kind}": layer[f"mlp.{b}.{kind}"] for a, b in zip(names, theirs, strict=True)}
        block |= {f"ls{n}.gamma": layer[f"layer_scale{n}.lambda1"] for n in (1, 2)}
        weights |= {f"blocks.{i}.{key}": value for key, value in block.items()}
    return {key: value.clone() for key, value in weights.items()}


@pytest.mark.parametrize("name", ["dinov3_vits16_pretrain_lvd1689m.pth", "eupe_vits16_pretrain_lvd1689m.pth"])
@pytest.mark.parametrize("size", [(64, 64), (96, 48)])
@pytest.mark.parametrize(
    "options",
    [{}, {"use_gated_mlp": True, "hidden_act": "silu"}, {"query_bias": False, "value_bias": False}],
    ids=["MLP", "SwiGLU", "no biases"],
)
def test_a_vit_file_gives_the_features_of_transformers(
    options: dict[str, object], size: tuple[int, int], name: str, tmp_path: Path
) -> None:
    model = vision_transformer(**options)
    torch.save(released(model), tmp_path / name)
    encoder = load_encoder(str(tmp_path / name), CPU)
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs, ours = model(images).last_hidden_state, encoder.backbone(images)
    assert largest_difference(ours.cls, theirs[:, 0]) < 1e-5
    assert largest_difference(ours.registers, theirs[:, 1:5]) < 1e-5
    assert largest_difference(ours.patches, theirs[:, 5:]) < 1e-5
    assert (encoder.size, encoder.mean, encoder.notes) == (256, WEB, ())


def test_a_training_checkpoint_gives_the_same_features(tmp_path: Path) -> None:
    weights = released(vision_transformer())
    torch.save(weights, tmp_path / "a.pth")
    heads = {"dino_head.last_layer.weight": torch.ones(3, 4), "ibot_head.mlp.0.weight": torch.ones(4, 64)}
    torch.save({"teacher": {f"backbone.{k}": v for k, v in weights.items()} | heads}, tmp_path / "b.pth")
    first, second = (load_encoder(str(tmp_path / f"{name}.pth"), CPU) for name in "ab")
    assert first.fingerprint == second.fingerprint


@pytest.mark.parametrize("form", ["ViT", "ConvNeXt"])
def test_heads_for_distillation_in_a_file_of_eupe_are_ignored(form: str, tmp_path: Path) -> None:
    weights = released(vision_transformer()) if form == "ViT" else convnext()[1]
    torch.save(weights, tmp_path / "a.pth")
    torch.save(weights | {"projectors.0.mlp.0.weight": torch.ones(3, 64)}, tmp_path / "b.pth")
    first, second = (load_encoder(str(tmp_path / f"{name}.pth"), CPU) for name in "ab")
    assert first.fingerprint == second.fingerprint


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_biases_that_timm_would_drop_are_refused(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """timm's names without `_qkvb` drop them, and load_state_dict reports that all keys match."""

    def folder(name: str, weights: dict[str, Tensor], architecture: str) -> Path:
        (tmp_path / name).mkdir()
        options = {"img_size": 64, "embed_dim": 64, "depth": 2, "num_heads": 2, "mlp_ratio": 2, "num_reg_tokens": 4}
        config = {"architecture": architecture, "model_args": options, "num_classes": 0}
        about = {"input_size": [3, 64, 64], "mean": WEB, "std": WEB, "num_classes": 0}
        (tmp_path / name / "config.json").write_text(json.dumps(config | {"pretrained_cfg": about}))
        save = save_file if kind.endswith("safetensors") else torch.save
        save(weights, tmp_path / name / kind)
        return tmp_path / name

    model, images = vision_transformer(), torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    weights = released(model)
    with torch.no_grad():
        expected = model(images).last_hidden_state[:, 0]
    biased = folder("biased", weights, "vit_small_patch16_dinov3")
    with pytest.raises(DinoError, match="drops the biases of queries and values in") as error:
        load_encoder(f"timm:local-dir:{biased}", CPU)
    assert error.value.hint == f"use {biased / kind} itself"
    for source in (str(biased / kind), f"timm:local-dir:{folder('own', weights, 'vit_small_patch16_dinov3_qkvb')}"):
        assert largest_difference(load_encoder(source, CPU).features(images), expected) < 1e-5
    # The released weights have biases of 0, which are dropped without harm.
    zeros = weights | {key: torch.zeros_like(value) for key, value in weights.items() if key.endswith("qkv.bias")}
    load_encoder(f"timm:local-dir:{folder('zeros', zeros, 'vit_small_patch16_dinov3')}", CPU)


def test_a_preset_without_biases_refuses_weights_with_them(tmp_path: Path) -> None:
    torch.save(released(vision_transformer()), tmp_path / "x.pth")
    shape = "{img_size=64, embed_dim=64, depth=2, num_heads=2, mlp_ratio=2, num_reg_tokens=4}"
    for name, fits in (("vit_small_patch16_dinov3", False), ("vit_small_patch16_dinov3_qkvb", True)):
        method = load_preset("tiny-dino", [f"backbone.name={name}", f"backbone.options={shape}"]).method()
        with nullcontext() if fits else pytest.raises(DinoError, match=r"attn\.q_bias is unknown"):
            start_from(method, str(tmp_path / "x.pth"))


def test_a_mask_that_leaves_a_bias_of_keys_is_refused(tmp_path: Path) -> None:
    weights = released(vision_transformer())
    weights["blocks.1.attn.qkv.bias_mask"][:] = 1
    torch.save(weights, tmp_path / "x.pth")
    with pytest.raises(DinoError, match=r"blocks\.1\.attn\.qkv\.bias has biases of keys up to 1; expected 0"):
        load_encoder(str(tmp_path / "x.pth"), CPU)


def test_a_mask_of_zeros_removes_all_biases(tmp_path: Path) -> None:
    model = vision_transformer()
    weights = released(model)
    for key in weights:
        if key.endswith("bias_mask"):
            weights[key][:] = 0
    torch.save(weights, tmp_path / "x.pth")
    for name, value in model.state_dict().items():
        if name.endswith(("q_proj.bias", "v_proj.bias")):
            value.zero_()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        ours = load_encoder(str(tmp_path / "x.pth"), CPU).backbone(images).cls
        assert largest_difference(ours, model(images).last_hidden_state[:, 0]) < 1e-5


def test_a_mask_that_was_never_initialized_is_refused(tmp_path: Path) -> None:
    weights = released(vision_transformer())
    weights["blocks.0.attn.qkv.bias_mask"][:] = torch.nan
    torch.save(weights, tmp_path / "x.pth")
    with pytest.raises(DinoError, match=r"blocks\.0\.attn\.qkv\.bias_mask holds 192 of 192 values"):
        load_encoder(str(tmp_path / "x.pth"), CPU)


def test_other_rotary_periods_are_refused(tmp_path: Path) -> None:
    weights = released(vision_transformer())
    weights["rope_embed.periods"] *= 1.01
    torch.save(weights, tmp_path / "x.pth")
    with pytest.raises(DinoError, match=r"rotary period rope_embed\.periods\[0\] of 1\.01; expected 1"):
        load_encoder(str(tmp_path / "x.pth"), CPU)


@pytest.mark.parametrize("key", ["cls_norm.weight", "blocks.0.attn.extra"])
def test_an_extra_key_is_an_error_that_names_it(key: str, tmp_path: Path) -> None:
    torch.save(released(vision_transformer()) | {key: torch.ones(64)}, tmp_path / "x.pth")
    with pytest.raises(DinoError, match=re.escape(f"{key} is unknown")):
        load_encoder(str(tmp_path / "x.pth"), CPU)


def test_every_missing_key_is_an_error(tmp_path: Path) -> None:
    weights = released(vision_transformer())
    optional = {"mask_token", "rope_embed.periods", "storage_tokens", *(k for k in weights if "bias_mask" in k)}
    for key in weights.keys() - optional:
        torch.save({k: v for k, v in weights.items() if k != key}, tmp_path / "x.pth")
        with pytest.raises(DinoError, match=r"is missing|without patch_embed"):
            load_encoder(str(tmp_path / "x.pth"), CPU)


@pytest.mark.parametrize(
    ("name", "width", "local_norm", "mean"),
    [
        ("dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth", 64, False, SATELLITE),
        ("renamed.pth", 1024, True, SATELLITE),
        ("renamed.pth", 1024, False, WEB),
        ("dinov3_vit7b16_pretrain_lvd1689m.pth", 64, True, WEB),
    ],
)
def test_satellite_weights_have_their_own_statistics(
    name: str, width: int, local_norm: bool, mean: tuple[float, ...], tmp_path: Path
) -> None:
    heads = {"num_attention_heads": width // 32, "num_hidden_layers": 1}
    weights = released(vision_transformer(hidden_size=width, **heads))
    norm = {"local_cls_norm.weight": torch.ones(width), "local_cls_norm.bias": torch.zeros(width)}
    torch.save(weights | (norm if local_norm else {}), tmp_path / name)
    encoder = load_encoder(str(tmp_path / name), CPU)
    assert (encoder.mean, encoder.notes) == (mean, ())


def test_statistics_that_no_name_tells_are_noted(tmp_path: Path) -> None:
    norm = {"local_cls_norm.weight": torch.ones(64), "local_cls_norm.bias": torch.zeros(64)}
    torch.save(released(vision_transformer()) | norm, tmp_path / "renamed.pth")
    (note,) = load_encoder(str(tmp_path / "renamed.pth"), CPU).notes
    assert "assuming ImageNet's" in note


def convnext() -> tuple[transformers.DINOv3ConvNextModel, dict[str, Tensor]]:
    config = transformers.DINOv3ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 2, 3, 1])
    model = transformers.DINOv3ConvNextModel(config)
    fill(model)
    weights = {}
    for key, value in model.state_dict().items():
        key = re.sub(r"^(?:model\.)?stages\.(\d)\.downsample_layers\.", r"downsample_layers.\1.", key)
        key = re.sub(r"^(?:model\.)?stages\.(\d)\.layers\.", r"stages.\1.", key)
        key = key.replace("depthwise_conv", "dwconv").replace("pointwise_conv", "pwconv")
        weights[key.replace(".layer_norm.", ".norm.").replace("layer_norm.", "norm.")] = value.clone()
    return model.eval(), weights | {f"norms.3.{kind}": weights[f"norm.{kind}"] for kind in ("weight", "bias")}


@pytest.mark.parametrize("size", [(64, 64), (96, 64)])
def test_a_convnext_file_gives_the_features_of_transformers(size: tuple[int, int], tmp_path: Path) -> None:
    model, weights = convnext()
    torch.save(weights, tmp_path / "dinov3_convnext_tiny.pth")
    encoder = load_encoder(str(tmp_path / "dinov3_convnext_tiny.pth"), CPU)
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs, ours = model(images), encoder.backbone(images)
    assert largest_difference(ours.cls, theirs.pooler_output) < 1e-5
    assert largest_difference(ours.patches, theirs.last_hidden_state[:, 1:]) < 1e-5
    assert (encoder.size, encoder.mean) == (256, WEB)


@pytest.mark.parametrize("key", ["norm.weight", "stages.2.1.gamma", "downsample_layers.3.1.bias"])
def test_a_convnext_file_without_a_key_is_refused(key: str, tmp_path: Path) -> None:
    torch.save({k: v for k, v in convnext()[1].items() if k != key}, tmp_path / "x.pth")
    with pytest.raises(DinoError, match="is missing"):
        load_encoder(str(tmp_path / "x.pth"), CPU)
