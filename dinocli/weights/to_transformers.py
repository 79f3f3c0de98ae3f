"""Model folder of transformers, written from a backbone: ViT, DINOv2 with or without registers, and DINOv3."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.layers import GluMlp, Mlp  # type: ignore[attr-defined]
from torch import Tensor, nn

from dinocli.core.atomic import write_text
from dinocli.core.errors import DinoError
from dinocli.core.tensors import write_tensors
from dinocli.core.version import __version__
from dinocli.data.views.crops import resize_for
from dinocli.features.encoder import Encoder
from dinocli.models.positions import Positions
from dinocli.models.transformer import RotaryBackbone, ViTBackbone
from dinocli.weights.graphs import Loaded
from dinocli.weights.released import rename

TRANSFORMERS_FILES = {"config.json", "model.safetensors", "preprocessor_config.json"}
_INSTEAD = "--to timm: transformers loads that folder too, as TimmWrapperModel"
_CLASSES = {
    "vit": "ViTModel",
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "dinov3_vit": "DINOv3ViTModel",
}
# Interpolation of learned positions in each class.
_POSITIONS: dict[str, Positions] = {"vit": "bicubic", "dinov2": "bicubic", "dinov2_with_registers": "antialias"}
# timm's keys, in the order of replacement, and those of transformers' files.
_LEARNED = (
    (r"^(cls_token|mask_token)$", r"embeddings.\1"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^reg_token$", "embeddings.register_tokens"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^blocks\.", "encoder.layer."),
    (r"\.ls([12])\.gamma$", r".layer_scale\1.lambda1"),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"^norm\.", "layernorm."),
)
_VIT = (
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)
_GATED = ((r"\.mlp\.fc1\.", ".mlp.weights_in."), (r"\.mlp\.fc2\.", ".mlp.weights_out."))
_ROTARY = (
    (r"^(cls_token|mask_token)$", r"embeddings.\1"),
    (r"^reg_token$", "embeddings.register_tokens"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings."),
    (r"^blocks\.", "layer."),
    (r"\.gamma_([12])$", r".layer_scale\1.lambda1"),
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"\.mlp\.fc1_g\.", ".mlp.gate_proj."),
    (r"\.mlp\.fc1(?:_x)?\.", ".mlp.up_proj."),
    (r"\.mlp\.fc2\.", ".mlp.down_proj."),
)


@dataclass(frozen=True)
class WrittenFolder:
    """Result of `write_transformers`.

    Attributes:
        loaded: transformers' network from the folder: normalized images to class tokens.
        notes: Notes for the user on differences in use.
    """

    loaded: Loaded
    notes: list[str]


def write_transformers(encoder: Encoder, folder: Path) -> WrittenFolder:
    """Write config, weights and preprocessing into a folder, and load it with transformers.

    A plain ViT becomes `ViTModel`; with LayerScale or SwiGLU `Dinov2Model`; with registers `Dinov2WithRegistersModel`;
    with rotary positions `DINOv3ViTModel`.

    Raises:
        DinoError: If transformers is not installed, or has no class for this network.
        OSError: If the disk is full or the folder is not writable.
    """
    transformers = _import()
    backbone, size = encoder.backbone, encoder.size
    if isinstance(backbone, ViTBackbone):
        kind, config, state = _describe_learned(backbone)
    elif isinstance(backbone, RotaryBackbone):
        kind, config, state = _describe_rotary(backbone)
    else:
        raise _no_class("networks other than plain vision transformers")
    native = backbone.native_size if isinstance(backbone, ViTBackbone) else size
    size = native if kind == "vit" else size  # ViTModel takes no other by default
    first: Any = backbone.blocks[0]
    write_text(
        folder / "config.json",
        json.dumps(
            {
                "model_type": kind,
                "architectures": [_CLASSES[kind]],
                "hidden_size": backbone.width,
                "num_hidden_layers": len(backbone.blocks),
                "num_attention_heads": int(first.attn.num_heads),
                "image_size": native,
                "patch_size": backbone.patch_size,
                "num_channels": encoder.channels,
                "layer_norm_eps": backbone.model.norm.eps,
                **config,
                # Later exports may replace a folder with this key. transformers keeps it as an attribute.
                "dinocli": __version__,
            },
            indent=2,
        ),
    )
    write_tensors(folder / "model.safetensors", {key: v.numpy() for key, v in state.items()}, {"format": "pt"})
    write_text(folder / "preprocessor_config.json", json.dumps(_describe_images(encoder, size), indent=2))
    return WrittenFolder(_load(transformers, folder, kind), _list_notes(encoder, kind, size))


def _import() -> Any:
    try:
        import transformers
    except ImportError as error:
        hint = "pip install 'dinocli[transformers]'"
        raise DinoError("--to transformers needs the package transformers, which is not installed", hint) from error
    return transformers


def _no_class(what: str) -> DinoError:
    return DinoError(f"transformers has no class for {what}", _INSTEAD)


def _describe_learned(backbone: ViTBackbone) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Return the kind of a ViT with learned positions, the settings that are its own, and its weights."""
    model: Any = backbone.model
    mlp = model.blocks[0].mlp
    if model.pos_embed is None:
        raise _no_class("networks without positions")
    gated = type(mlp) is GluMlp and isinstance(mlp.act, nn.SiLU) and not mlp.gate_last
    if not gated and not (type(mlp) is Mlp and isinstance(mlp.act, nn.GELU) and mlp.act.approximate == "none"):
        raise _no_class(f"blocks with {type(mlp).__name__} and {type(mlp.act).__name__}")
    state, registers = dict(model.state_dict()), model.num_prefix_tokens - 1
    positions = state["pos_embed"]
    if model.no_embed_class:  # the class token has no position, and the file needs one
        state["pos_embed"] = torch.cat([torch.zeros_like(positions[:, :1]), positions], 1)
    elif registers:  # the file has no positions of registers
        state["reg_token"] = state["reg_token"] + positions[:, 1 : 1 + registers]
        state["pos_embed"] = torch.cat([positions[:, :1], positions[:, 1 + registers :]], 1)
    scaled = "blocks.0.ls1.gamma" in state
    kind = "dinov2_with_registers" if registers else "dinov2" if scaled or gated else "vit"
    config: dict[str, Any] = {"qkv_bias": "blocks.0.attn.qkv.bias" in state, "hidden_act": "gelu"}
    inner = state["blocks.0.mlp.fc2.weight"].shape[1]
    if kind == "vit":
        config["intermediate_size"] = inner
    else:
        config |= {"mlp_ratio": _find_ratio(inner, backbone.width, gated=gated), "use_swiglu_ffn": gated}
        config |= {"num_register_tokens": registers} if registers else {}
        state |= {} if scaled else _scales(backbone, "ls{}.gamma")
        state["mask_token"] = torch.zeros(1, backbone.width)
    rules = (*_LEARNED, *(_VIT if kind == "vit" else _GATED if gated else ()))
    return kind, config, _rename_all(_split_qkv(state, "attention.attention", ("query", "key", "value")), rules)


def _describe_rotary(backbone: RotaryBackbone) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Return the kind of a DINOv3 ViT, the settings that are its own, and its weights."""
    model: Any = backbone.model
    state = {key: value for key, value in model.state_dict().items() if not key.startswith("rope.")}
    gated, biased = "blocks.0.mlp.fc1_g.weight" in state, "blocks.0.attn.q_bias" in state
    registers = model.num_prefix_tokens - 1
    config = {
        "intermediate_size": state["blocks.0.mlp.fc2.weight"].shape[1],
        "hidden_act": "silu" if gated else "gelu",
        "use_gated_mlp": gated,
        "rope_theta": float(model.rope.temperature),
        "num_register_tokens": registers,
        "query_bias": biased,
        "key_bias": False,
        "value_bias": biased,
    }
    for key in [key for key in state if key.endswith(("attn.q_bias", "attn.v_bias", "attn.k_bias"))]:
        stem, _, letter = key.removesuffix("_bias").rpartition(".")
        if letter != "k":
            state[f"{stem.removesuffix('.attn')}.attention.{letter}_proj.bias"] = state[key]
        del state[key]
    state |= {} if "blocks.0.gamma_1" in state else _scales(backbone, "gamma_{}")
    state["mask_token"] = torch.zeros(1, 1, backbone.width)
    if not registers:
        state["reg_token"] = torch.zeros(1, 0, backbone.width)
    names = ("q_proj", "k_proj", "v_proj")
    return "dinov3_vit", config, _rename_all(_split_qkv(state, "attention", names), _ROTARY)


def _find_ratio(inner: int, width: int, *, gated: bool) -> int:
    """Return the MLP ratio of DINOv2's classes, which is a whole number.

    Raises:
        DinoError: If no whole number gives this width.
    """
    for ratio in range(1, 17):
        # DINOv2's SwiGLU has two thirds of the width, rounded up to a multiple of 8.
        if inner == ((int(width * ratio * 2 / 3) + 7) // 8 * 8 if gated else width * ratio):
            return ratio
    raise _no_class(f"an MLP of {inner} channels in a network of {width}; its ratio must be a whole number")


def _scales(backbone: ViTBackbone | RotaryBackbone, name: str) -> dict[str, Tensor]:
    """Return scales of 1 for networks without LayerScale."""
    ends = [name.format(branch) for branch in (1, 2)]
    return {f"blocks.{i}.{end}": torch.ones(backbone.width) for i in range(len(backbone.blocks)) for end in ends}


def _split_qkv(state: Mapping[str, Tensor], place: str, names: tuple[str, str, str]) -> dict[str, Tensor]:
    """Split the weights of queries, keys and values, which transformers stores apart."""
    split: dict[str, Tensor] = {}
    for key, value in state.items():
        stem, joint, end = key.partition(".attn.qkv.")
        if not joint:
            split[key] = value
            continue
        split |= {f"{stem}.{place}.{name}.{end}": part for name, part in zip(names, value.chunk(3), strict=True)}
    return split


def _rename_all(state: Mapping[str, Tensor], rules: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    return {rename(key, rules): value.detach().cpu() for key, value in state.items()}


def _describe_images(encoder: Encoder, size: int) -> dict[str, Any]:
    """Return the preprocessing of `dino extract` in the words of transformers."""
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": encoder.channels == 3,
        "do_resize": True,
        "size": {"shortest_edge": resize_for(size)},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": encoder.mean,
        "image_std": encoder.std,
    }


def _load(transformers: Any, folder: Path, kind: str) -> Loaded:
    """Load a folder with transformers, and check that it has a place for each weight."""
    with _silence(transformers):
        model, info = transformers.AutoModel.from_pretrained(folder, output_loading_info=True, local_files_only=True)
        transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    missing = {key for key in info["missing_keys"] if not key.startswith("pooler.")}
    if odd := sorted(missing | set(info["unexpected_keys"])):
        raise _no_class(f"the weights of this network: {_CLASSES[kind]} does not fit {odd[0]}")
    model.eval()
    return lambda images: model(pixel_values=images).last_hidden_state[:, 0]


@contextmanager
def _silence(transformers: Any) -> Iterator[None]:
    """Turn off transformers' reports and progress while it loads, and restore them."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def _list_notes(encoder: Encoder, kind: str, size: int) -> list[str]:
    notes, backbone = [], encoder.backbone
    if kind == "vit":
        notes.append("the features are last_hidden_state[:, 0]; the weights of ViTModel's pooler_output are random")
    if isinstance(backbone, ViTBackbone):
        how = "needs interpolate_pos_encoding=True" if kind == "vit" else ""
        differ = "resamples positions differently: features differ" if backbone.positions != _POSITIONS[kind] else ""
        if how or differ:
            words = " and ".join(filter(None, [how, differ]))
            notes.append(f"at sizes other than {backbone.native_size} pixels transformers {words}")
    if (resize_for(size) - size) % 2:  # half a pixel, which one rounds up and the other down
        notes.append(f"AutoImageProcessor crops {size} of {resize_for(size)} pixels one pixel beside dino extract")
    return notes
