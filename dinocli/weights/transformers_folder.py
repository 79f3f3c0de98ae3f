"""Model folders of transformers with DINOv2 or DINOv3 weights: config.json and safetensors files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinocli.core.checksums import parse
from dinocli.core.errors import DinoError
from dinocli.core.tensors import load_tensors
from dinocli.weights.dinov3 import read_dinov3
from dinocli.weights.identify import TRANSFORMERS, config_of
from dinocli.weights.official import official_architecture, under_timms_keys
from dinocli.weights.released import IMAGENET, Preprocessing, Released, rename

# Keys in the files, in the order of replacement, and the original's keys. In memory, transformers renames some of them.
_COMMON = (
    (r"^embeddings\.(cls_token|mask_token|register_tokens)$", r"\1"),
    (r"^embeddings\.patch_embeddings\.(?:projection\.)?", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^(?:encoder\.)?layer\.(\d+)\.", r"blocks.\1."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.attention\.(?:attention\.)?(?:query|q_proj)\.", ".attn.q."),
    (r"\.attention\.(?:attention\.)?(?:key|k_proj)\.", ".attn.k."),
    (r"\.attention\.(?:attention\.)?(?:value|v_proj)\.", ".attn.v."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.weights_out\.", ".mlp.w3."),
    (r"^layernorm\.", "norm."),
)
_PLAIN_MLP = ((r"\.mlp\.up_proj\.", ".mlp.fc1."), (r"\.mlp\.down_proj\.", ".mlp.fc2."))
_GATED_MLP = (
    (r"\.mlp\.gate_proj\.", ".mlp.w1."),
    (r"\.mlp\.up_proj\.", ".mlp.w2."),
    (r"\.mlp\.down_proj\.", ".mlp.w3."),
)
_CONVNEXT = (
    (r"^stages\.(\d+)\.downsample_layers\.", r"downsample_layers.\1."),
    (r"^stages\.(\d+)\.layers\.", r"stages.\1."),
    (r"\.depthwise_conv\.", ".dwconv."),
    (r"\.pointwise_conv([12])\.", r".pwconv\1."),
    (r"^(stages\..*)\.layer_norm\.", r"\1.norm."),
    (r"^layer_norm\.", "norm."),
)
# Values of config.json that change the features and that no shape shows, with those of timm's networks.
_EXPECTED: dict[str, dict[str, Any]] = {
    "dinov2": {"layer_norm_eps": 1e-6, "hidden_act": "gelu"},
    "dinov2_with_registers": {"layer_norm_eps": 1e-6, "hidden_act": "gelu"},
    "dinov3_vit": {"layer_norm_eps": 1e-5, "rope_theta": 100.0, "hidden_act": "gelu"},
    "dinov3_convnext": {"layer_norm_eps": 1e-6, "hidden_act": "gelu"},
}


def read_folder(folder: Path) -> Released | None:
    """Return the weights of a transformers folder in the form of timm, or None if its config names another model.

    Raises:
        DinoError: If a file is missing or corrupt, or a key or setting is not one of these models.
    """
    config = config_of(folder)
    kind = config.get("model_type")
    if kind not in TRANSFORMERS:
        return None
    gated = kind == "dinov3_vit" and bool(config.get("use_gated_mlp"))
    for key, expected in (_EXPECTED[kind] | ({"hidden_act": "silu"} if gated else {})).items():
        if (value := config.get(key, expected)) != expected:
            raise DinoError(
                f"{folder}/config.json has {key}={value!r}; expected {expected!r}, as in the released models",
                "use another checkpoint",
            )
    tensors = _load(folder, kind)
    if kind == "dinov3_convnext":
        renamed = _rename(tensors, _CONVNEXT, folder)
    else:
        mlp = _GATED_MLP if gated else _PLAIN_MLP
        renamed = _rename(tensors, (*_COMMON, *mlp), folder)
        renamed = _join_qkv(renamed, folder, keys_have_bias=kind != "dinov3_vit")
    if "register_tokens" in renamed and not renamed["register_tokens"].numel():
        del renamed["register_tokens"]  # transformers stores an empty table for none
    mask_token = renamed.pop("mask_token", None)
    mask_token = None if mask_token is None else mask_token.view(1, -1)
    if kind.startswith("dinov3"):
        released = _read_dinov3(renamed, config, str(folder))
    else:
        released = _read_dinov2(renamed, config, str(folder))
    preprocessing, notes = _read_preprocessing(folder, released.preprocessing)
    return Released(released.backbone, released.architecture, preprocessing, mask_token, notes)


def _read_dinov3(renamed: dict[str, Tensor], config: Mapping[str, Any], source: str) -> Released:
    if "register_tokens" in renamed:
        renamed["storage_tokens"] = renamed.pop("register_tokens")
    if heads := config.get("num_attention_heads"):  # the files hold no periods; these stand for the width of a head
        quarter = int(config["hidden_size"]) // int(heads) // 4
        renamed["rope_embed.periods"] = 100.0 ** (torch.arange(quarter) / quarter)
    released = read_dinov3(renamed, source)
    if released is None:
        raise DinoError(
            f"{source} holds no DINOv3 weights; its first keys are {', '.join(list(renamed)[:3])}",
            "download the folder again",
        )
    return released


def _read_dinov2(renamed: dict[str, Tensor], config: Mapping[str, Any], source: str) -> Released:
    backbone = under_timms_keys(renamed)
    heads = f"backbone.options.num_heads={config.get('num_attention_heads', 0)}"
    architecture = official_architecture(backbone, source, [heads])
    # transformers interpolates positions to the exact size, and antialiases them only in networks with registers.
    positions = "antialias" if "register_tokens" in renamed else "bicubic"
    architecture = architecture.model_copy(update={"positions": positions})
    return Released(backbone, architecture, Preprocessing(int(architecture.options["img_size"]), *IMAGENET))  # type: ignore[arg-type]


def _load(folder: Path, kind: str) -> dict[str, Tensor]:
    """Load the tensors of all files, without the prefix and the classifier of a model for a task."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        try:
            names = sorted(set(parse(index.read_bytes())["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DinoError(f"{index} is corrupt: {error}", "download the folder again") from error
    tensors: dict[str, Tensor] = {}
    for name in names:
        try:
            tensors |= load_tensors(folder / name)[0]
        except FileNotFoundError as error:
            raise DinoError(
                f"{folder} has a config.json and no {name}",
                "download it, or convert it in Python: model.save_pretrained(FOLDER, safe_serialization=True)",
            ) from error
        except (OSError, ValueError) as error:
            raise DinoError(f"{folder / name} is corrupt: {error}", "download it again") from error
    prefix = f"{kind}."
    if any(key.startswith(prefix) for key in tensors):
        tensors = {key: value for key, value in tensors.items() if not key.startswith("classifier.")}
    return {key.removeprefix(prefix): value for key, value in tensors.items()}


def _rename(tensors: Mapping[str, Tensor], rules: tuple[tuple[str, str], ...], folder: Path) -> dict[str, Tensor]:
    """Rename keys by all rules in order.

    Raises:
        DinoError: If no rule fits a key and it is not one of the original's.
    """
    renamed: dict[str, Tensor] = {}
    for key, value in tensors.items():
        new = rename(key, rules)
        if new == key and not key.startswith(("norm.", "downsample_layers.")):
            raise DinoError(f"{folder}: the weight {key} is unknown", "use the files of one released model only")
        renamed[new] = value
    return renamed


def _join_qkv(tensors: Mapping[str, Tensor], folder: Path, *, keys_have_bias: bool) -> dict[str, Tensor]:
    """Join the weights of queries, keys and values, which transformers stores apart.

    Args:
        tensors: Weights under the original's keys, apart from these.
        folder: Folder of the weights, for errors.
        keys_have_bias: If False, a missing bias of keys is 0.

    Raises:
        DinoError: If one of the three is missing.
    """
    joined: dict[str, Tensor] = {}
    for key, value in tensors.items():
        found = re.fullmatch(r"(blocks\.\d+\.attn)\.([qkv])\.(weight|bias)", key)
        if not found:
            joined[key] = value
            continue
        stem, _, kind = found.groups()
        parts = {letter: tensors.get(f"{stem}.{letter}.{kind}") for letter in "qkv"}
        if kind == "bias" and not keys_have_bias and parts["k"] is None:
            parts["k"] = torch.zeros_like(value)
        if missing := [letter for letter, part in parts.items() if part is None]:
            block = stem.split(".")[1]
            raise DinoError(
                f"{folder}: the {kind} of the {dict(q='query', k='key', v='value')[missing[0]]} in layer {block} is "
                "missing",
                "download the folder again",
            )
        joined[f"{stem}.qkv.{kind}"] = torch.cat([part for part in parts.values() if part is not None])
    return joined


def _read_preprocessing(folder: Path, default: Preprocessing) -> tuple[Preprocessing, tuple[str, ...]]:
    """Return size, mean and std from preprocessor_config.json, or the default with a note."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        mean, std = (" ".join(f"{value:g}" for value in values) for values in (default.mean, default.std))
        return default, (f"{folder} has no preprocessor_config.json; assuming mean {mean} and std {std}",)
    try:
        stored = parse(path.read_bytes())
        size = stored.get("crop_size") if stored.get("do_center_crop") else stored.get("size")
        side = size if isinstance(size, int) else (size or {}).get("height") or (size or {}).get("shortest_edge")
        shift, scale = (tuple(float(value) for value in stored[key]) for key in ("image_mean", "image_std"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DinoError(f"{path} is corrupt: {error}", "download it again") from error
    return Preprocessing(int(side or default.size), shift, scale), ()
