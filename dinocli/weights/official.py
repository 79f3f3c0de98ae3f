"""Official files: their weights under timm's keys, and the architecture inferred from their shapes."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from dinocli.core.config import change
from dinocli.core.errors import DinoError
from dinocli.models.architecture import BackboneConfig
from dinocli.models.backbone import Backbone
from dinocli.models.head import HeadConfig
from dinocli.models.network import load_strictly
from dinocli.models.positions import Positions

# Blocks and heads of DINO's vision transformers, by width.
OFFICIAL = {192: (12, 3), 384: (12, 6), 768: (12, 12)}
# Widths of DINO, and of DINOv2's ViT-S, B, L and g. All their heads have 64 channels; no weight's shape shows it.
_ORIGINAL_WIDTHS = {*OFFICIAL, 1024, 1536}
_HEAD_WIDTH = 64
# Widths that well-known networks with the same keys split into another number of heads.
_OTHERS_HEADS = {1280: "fits 20 heads, as in the originals, or 16, as in ViT-H"}
_TINY = 96
HEADS = "--set backbone.options.num_heads="


def under_timms_keys(backbone: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename DINOv2 weights to timm's keys; return all others unchanged.

    Chunked blocks (`blocks.0.3.`, as saved in training) become one list. SwiGLU's `w12` and `w3` become timm's `fc1`
    and `fc2`. With registers, DINOv2 stores the class token and its position separately, and timm stores their sum.

    Source: timm's _convert_dinov2.
    """
    if "cls_token" not in backbone:
        return dict(backbone)  # in convolutional networks `blocks.0.1.` is not a chunk
    found = {}
    for key, value in backbone.items():
        key = re.sub(r"^blocks\.\d+\.(?=\d+\.)", "blocks.", key)
        key = key.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")
        found["reg_token" if key == "register_tokens" else key] = value
    if "register_tokens" in backbone and "pos_embed" in found:
        placed = found["pos_embed"]
        found |= {"cls_token": found["cls_token"] + placed[:, :1], "pos_embed": placed[:, 1:]}
    return found


def official_architecture(backbone: Mapping[str, Tensor], source: str, overrides: Sequence[str] = ()) -> BackboneConfig:
    """Infer the architecture of weights in an original's layout from their keys and shapes.

    Width, depth, patch size, image size, MLP ratio, registers, LayerScale and SwiGLU follow from shapes. The number of
    attention heads does not: it defaults to the width divided by 64, as in all originals.

    Args:
        backbone: Weights under timm's keys.
        source: Origin of the weights, for errors.
        overrides: `backbone.key=value`, as for `--set`.

    Raises:
        DinoError: If the network is unknown, an override does not fit, or the number of heads is ambiguous.
    """
    found = None
    if "patch_embed.proj.weight" in backbone and "pos_embed" in backbone and "cls_token" in backbone:
        found = _vision_transformer(backbone, source)
    elif (
        "layer4.2.conv3.weight" in backbone
        and "layer3.5.conv3.weight" in backbone
        and "layer3.6.conv3.weight" not in backbone
    ):
        found = BackboneConfig(name="resnet50")
    if found is None:
        raise _explain_unknown(backbone, source)
    data = {"backbone": found.model_dump(exclude_none=True)}
    for override in overrides:
        change(data, override)
    config = BackboneConfig.parse(data["backbone"], f"--set for {source}")
    width = config.options.get("embed_dim")
    return _with_heads(config, width, source) if isinstance(width, int) else config


def heads_are_assumed(architecture: BackboneConfig) -> bool:
    """Return True if the inferred number of heads is a guess, because no original has this width."""
    width = architecture.options.get("embed_dim")
    return width is not None and width not in _ORIGINAL_WIDTHS


def _explain_unknown(backbone: Mapping[str, Tensor], source: str) -> DinoError:
    keys = ", ".join(list(backbone)[:3])
    if any(key.startswith("embeddings.") for key in backbone):
        return DinoError(
            f"{source} has transformers' keys ({keys}); expected its folder, with config.json",
            "name the folder instead of a file in it",
        )
    return DinoError(
        f"{source} is not a network of DINO, iBOT or MAE (ViT, XCiT, ResNet-50), DINOv2 or DINOv3; its first keys are "
        f"{keys}",
        "use a ckpt.safetensors of this tool, an official .pth of these, a transformers folder, or timm:NAME",
    )


def _vision_transformer(backbone: Mapping[str, Tensor], source: str) -> BackboneConfig | None:
    """Return the architecture without its number of heads, or None if the blocks are not those of a plain ViT."""
    registers = backbone["reg_token"].shape[1] if "reg_token" in backbone else 0
    # Of any block, so that a weight missing in one is reported as missing.
    scaled = any(key.endswith((".ls1.gamma", ".ls2.gamma")) for key in backbone)
    first, second = (backbone.get(f"blocks.0.mlp.{layer}.weight") for layer in ("fc1", "fc2"))
    if first is None or second is None or "blocks.0.attn.qkv.weight" not in backbone:
        return None
    options: dict[str, bool | int | float | str] = {**_sizes(backbone, source, unplaced=1 if registers else 0)}
    width, inside = int(options["embed_dim"]), len(first)
    gated = inside == 2 * second.shape[1]  # SwiGLU: one half of the first layer gates the other
    if gated and not scaled:
        return None  # timm has SwiGLU only with LayerScale
    if gated or inside != 4 * width:
        options["mlp_ratio"] = inside / width if inside % width == 0 else (inside + 0.5) / width  # timm rounds down
    if registers:
        options["reg_tokens"] = registers
    if not any(key.endswith(".attn.qkv.bias") for key in backbone):
        options["qkv_bias"] = False
    if scaled:
        size = "giant" if gated else "small"  # timm's base for networks with SwiGLU, and without
        name = f"vit_{size}_patch14_{'reg4_' if registers else ''}dinov2"
    else:
        name = "vit_small_patch16_224"
        options |= {"no_embed_class": True} if registers else {}
    # The released code resamples positions of networks without registers as DINO does: by (rows + 0.1) / 37, without
    # antialiasing. Those of the later networks with registers are resampled to the exact size, with antialiasing
    # (facebookresearch/dinov2@b8931f7 dinov2/hub/backbones.py). timm antialiases both.
    positions: Positions = "antialias" if registers else "dino"
    if not scaled and not registers and not backbone["pos_embed"][:, 0].any():
        positions = "bicubic"  # MAE: fixed sines, with 0 for the class token; facebookresearch/mae@efb2a80 pos_embed.py
    return BackboneConfig(name=name, options=options, positions=positions)


def _sizes(backbone: Mapping[str, Tensor], source: str, *, unplaced: int) -> dict[str, int]:
    """Return the sizes as timm's options; `unplaced` is 1 if the class token has no position, else 0."""
    width, channels, patch, across = backbone["patch_embed.proj.weight"].shape
    places = backbone["pos_embed"].shape[1] - 1 + unplaced
    side = round(places**0.5)
    if side**2 != places or patch != across:
        raise DinoError(
            f"{source} has {places} positions and patches of {patch}x{across}; only square ones are supported",
            "use a checkpoint with square images and patches",
        )
    blocks = len({key.split(".")[1] for key in backbone if key.startswith("blocks.")})
    sizes = {"embed_dim": width, "depth": blocks, "patch_size": patch, "img_size": side * patch}
    return sizes | ({"in_chans": channels} if channels != 3 else {})


def _with_heads(config: BackboneConfig, width: int, source: str) -> BackboneConfig:
    heads = config.options.get("num_heads")
    if heads is None:
        if width in _OTHERS_HEADS or width % _HEAD_WIDTH:
            why = _OTHERS_HEADS.get(width, "is not a multiple of 64")
            raise DinoError(
                f"{source} does not store its number of attention heads, and its width {width} {why}",
                f"{HEADS}N with the number it was trained with"
                + (" (6 for preset tiny-dino)" if width == _TINY else ""),
            )
        return config.model_copy(update={"options": config.options | {"num_heads": width // _HEAD_WIDTH}})
    if type(heads) is not int or heads < 1 or width % heads:
        fitting = [n for n in range(1, width + 1) if width % n == 0 and 16 <= width // n <= 128]
        raise DinoError(
            f"{HEADS}{heads} does not divide the {width} channels of {source}",
            f"one of {', '.join(map(str, fitting))}" if fitting else f"{HEADS}1",
        )
    return config


def original_network(backbone: Backbone, name: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """Build the original's network with a backbone's weights: a plain vision transformer, or torchvision's network.

    Args:
        backbone: Backbone with the weights.
        name: timm's name of its architecture.

    Returns:
        The network, and a function from images [B, C, H, W] to features [B, D].

    Raises:
        DinoError: If the original has no network for these weights.
    """
    import torchvision

    from dinocli.models.transformer import ViTBackbone

    if isinstance(backbone, ViTBackbone):
        options: dict[str, Any] = {"img_size": backbone.native_size, **backbone.shape}
        plain = BackboneConfig(name="vit_small_patch16_224", options=options, positions="dino").build(drop_path=False)
        network, forward = plain.model.eval(), lambda images: plain(images).cls
    elif name in torchvision.models.list_models():
        network = forward = torchvision.models.get_model(name).eval()
        network.fc = nn.Identity()
    else:
        raise DinoError(
            "the original code builds vision transformers with learned positions and torchvision's networks; "
            f"{name} is neither",
            "--to timm",
        )
    try:
        load_strictly(network, backbone.model.state_dict(), name)
    except DinoError as misfit:
        raise DinoError(f"the original code has no such network: {misfit.message}", "--to timm") from misfit
    return network, forward


def original_head(weights: Mapping[str, Tensor]) -> nn.Module:
    """Build the original's head from weights under its keys, with torch's own weight norm.

    Raises:
        DinoError: If the weights are not those of a DINO head.
    """
    config, width = HeadConfig.of(weights)
    head = config.build(width).eval()
    # torch deprecates this weight norm; the newer one has other keys.
    with warnings.catch_warnings(action="ignore"):
        head.last_layer = nn.utils.weight_norm(nn.Linear(config.bottleneck, config.outputs, bias=False))
    head.load_state_dict(weights)
    return head
