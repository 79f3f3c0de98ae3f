"""DINOv3's own files (ViT and ConvNeXt), which EUPE shares: their weights under timm's keys, and the architecture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dinocli.core.errors import DinoError
from dinocli.models.architecture import BackboneConfig, Option
from dinocli.weights.released import IMAGENET, Preprocessing, Released, rename

# README of facebookresearch/dinov3@6876159: satellite images have their own statistics, the others ImageNet's.
_SATELLITE = (0.430, 0.411, 0.296), (0.213, 0.156, 0.143)
_SIZE = 256
_ROPE_BASE = 100.0
# Largest relative error of periods that were stored in bfloat16: half of its precision of 2**-7, and some more.
_ROUNDING = 0.005
# The norm of local crops, and EUPE's heads that compare with its teachers: features of images do not use them.
_TRAINING_ONLY = ("local_cls_norm.", "projectors.")
_TO_TIMM = (
    (r"^storage_tokens$", "reg_token"),
    (r"\.ls([12])\.gamma$", r".gamma_\1"),
    (r"\.mlp\.w1\.", ".mlp.fc1_g."),
    (r"\.mlp\.w2\.", ".mlp.fc1_x."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
)
_CONVNEXT_TO_TIMM = (
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.pwconv([12])\.", r".mlp.fc\1."),
    (r"^norm\.", "head.norm."),
)


def read_dinov3(backbone: Mapping[str, Tensor], source: str) -> Released | None:
    """Return weights under DINOv3's own keys in the form of timm, or None if they have other keys.

    Args:
        backbone: Weights without any prefix, and without the mask token.
        source: Origin of the weights, for errors, and to recognise those trained on satellite images.

    Raises:
        DinoError: If the weights have keys that no released model has, or other rotary positions.
    """
    if "storage_tokens" in backbone or "rope_embed.periods" in backbone:
        return _read_vision_transformer(backbone, source)
    if "downsample_layers.0.0.weight" in backbone:
        return _read_convnext(backbone, source)
    return None


def _read_vision_transformer(backbone: Mapping[str, Tensor], source: str) -> Released:
    if "patch_embed.proj.weight" not in backbone:
        raise DinoError(f"{source} is a DINOv3 file without patch_embed.proj.weight", "download it again")
    width, channels, patch, _ = backbone["patch_embed.proj.weight"].shape
    heads = _count_heads(backbone.get("rope_embed.periods"), width, source)
    tensors: dict[str, Tensor] = {}
    for key, value in backbone.items():
        if key == "rope_embed.periods" or key.startswith(_TRAINING_ONLY) or key.endswith(".attn.qkv.bias_mask"):
            continue
        if key.endswith(".attn.qkv.bias"):
            tensors |= _split_bias(key, value, backbone.get(f"{key}_mask"), source)
        else:
            tensors[rename(key, _TO_TIMM)] = value
    # Of any block, so that a weight missing in one is reported as missing.
    gated, biased = (any(key.endswith(end) for key in tensors) for end in (".fc1_g.weight", ".q_bias"))
    inner = next((v for k, v in tensors.items() if k.endswith(".fc1_g.weight" if gated else ".fc1.weight")), None)
    options: dict[str, Option] = {
        "embed_dim": width,
        "depth": len({key.split(".")[1] for key in tensors if key.startswith("blocks.")}),
        "num_heads": heads,
        "patch_size": patch,
        "img_size": _SIZE // patch * patch,
        "num_reg_tokens": tensors["reg_token"].shape[1] if "reg_token" in tensors else 0,
        "mlp_ratio": (len(inner) if inner is not None else 4 * width) / width,
    }
    options |= {"in_chans": channels} if channels != 3 else {}
    # timm's names without `qkvb` have no biases of queries and values. They drop those of a file with a printed line.
    name = f"vit_small{'_plus' if gated else ''}_patch16_dinov3{'_qkvb' if biased else ''}"
    satellite = "sat493m" in Path(source).name.lower() or (width == 1024 and "local_cls_norm.weight" in backbone)
    unsure = not satellite and "local_cls_norm.weight" in backbone and "lvd1689m" not in Path(source).name.lower()
    note = f"{source} does not store its statistics; assuming ImageNet's, as for web images (lvd1689m)"
    return Released(
        tensors,
        BackboneConfig(name=name, options=options),
        Preprocessing(_SIZE, *(_SATELLITE if satellite else IMAGENET)),
        notes=(f"{note}; for satellite images, name the file ...sat493m.pth",) if unsure else (),
    )


def _count_heads(periods: Tensor | None, width: int, source: str) -> int:
    """Return the number of attention heads, whose channels are four times the rotary periods.

    Raises:
        DinoError: If the periods are not those of the released models, which timm computes anew.
    """
    if periods is None:
        return width // 64
    head = 4 * len(periods)
    expected = _ROPE_BASE ** (2 * torch.arange(len(periods)) / (head / 2))
    wrong = (periods.float() / expected - 1).abs() > _ROUNDING
    if width % head or wrong.any():
        i = int(wrong.float().argmax())
        raise DinoError(
            f"{source} has a rotary period rope_embed.periods[{i}] of {float(periods[i]):.4g}; expected "
            f"{float(expected[i]):.4g}, of base {_ROPE_BASE:g} and heads of {head} channels",
            "use weights with DINOv3's rotary positions",
        )
    return width // head


def _split_bias(key: str, bias: Tensor, mask: Tensor | None, source: str) -> dict[str, Tensor]:
    """Return the biases of queries and values; the released code multiplies by a mask, which is 0 for keys.

    Raises:
        DinoError: If keys have a bias, for which timm has no place.
    """
    q, k, v = (bias if mask is None else bias * mask.to(bias.dtype)).chunk(3)
    if k.any():
        raise DinoError(
            f"{source}: {key} has biases of keys up to {float(k.abs().max()):.2g}; expected 0, as released",
            "use weights with masked biases of keys, as DINOv3 trains them",
        )
    stem = key.removesuffix("qkv.bias")
    return {f"{stem}q_bias": q.clone(), f"{stem}v_bias": v.clone()}


def _read_convnext(backbone: Mapping[str, Tensor], source: str) -> Released:
    # `norms.3` repeats `norm`; the released code's other `norms` serve dense tasks only.
    kept = {key: value for key, value in backbone.items() if not key.startswith(("norms.", *_TRAINING_ONLY))}
    tensors = {rename(key, _CONVNEXT_TO_TIMM): value for key, value in kept.items()}
    stages = {int(key.split(".")[1]) for key in tensors if key.startswith("stages.")}
    depths = tuple(
        len({key.split(".")[3] for key in tensors if key.startswith(f"stages.{i}.blocks.")}) for i in sorted(stages)
    )
    dims = tuple(len(tensors[key]) for i in sorted(stages) if (key := f"stages.{i}.blocks.0.gamma") in tensors)
    channels = backbone["downsample_layers.0.0.weight"].shape[1]
    options: dict[str, Option] = {"depths": depths, "dims": dims}
    options |= {"in_chans": channels} if channels != 3 else {}
    return Released(tensors, BackboneConfig(name="convnext_tiny", options=options), Preprocessing(_SIZE, *IMAGENET))
