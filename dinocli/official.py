"""Official files: what timm calls the weights in them, and which of the originals' networks they are of."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from dinocli.errors import DinoError
from dinocli.models.architecture import BackboneConfig

# DINO's vision transformers, by width: blocks and heads.
OFFICIAL = {192: (12, 3), 384: (12, 6), 768: (12, 12)}
# DINOv2's ViT-S, B, L and g, by width: heads, which no weight tells. Blocks are counted. Other widths are of others,
# who cut them into other heads: under the same keys a well-known network of width 1280 has 16 of 80.
_HEADS = {384: 6, 768: 12, 1024: 16, 1536: 24}


def under_timms_keys(backbone: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A backbone's weights under timm's keys, where they are DINOv2's; all others as they are.

    Chunks of blocks (`blocks.0.3.`, which a training writes) become a row, SwiGLU's `w12` and `w3` timm's `fc1` and
    `fc2`. A network with registers holds its class token and that token's position apart, where timm holds their sum.

    Source: timm's _convert_dinov2.
    """
    if "cls_token" not in backbone:
        return dict(backbone)  # what convolutional networks call `blocks.0.1.` is no chunk
    found = {}
    for key, value in backbone.items():
        key = re.sub(r"^blocks\.\d+\.(?=\d+\.)", "blocks.", key)
        key = key.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")
        found["reg_token" if key == "register_tokens" else key] = value
    if "register_tokens" in backbone and "pos_embed" in found:
        placed = found["pos_embed"]
        found |= {"cls_token": found["cls_token"] + placed[:, :1], "pos_embed": placed[:, 1:]}
    return found


def official_architecture(backbone: Mapping[str, Tensor], source: str) -> BackboneConfig:
    """Which of the originals' networks some weights are of, told by their keys and shapes.

    Args:
        backbone: Under timm's keys.
        source: Where they came from, for the error.

    Raises:
        DinoError: None of them.
    """
    found = None
    if "patch_embed.proj.weight" in backbone and "pos_embed" in backbone:
        found = _dinov2(backbone) if "blocks.0.ls1.gamma" in backbone else _dino(backbone)
    elif (
        "layer4.2.conv3.weight" in backbone
        and "layer3.5.conv3.weight" in backbone
        and "layer3.6.conv3.weight" not in backbone
    ):
        found = BackboneConfig(name="resnet50")
    if found:
        return found
    if "storage_tokens" in backbone or "rope_embed.periods" in backbone:
        raise DinoError(
            f"{source} is a file of DINOv3's own, which is not read",
            "timm holds the same weights: timm:vit_small_patch16_dinov3.lvd1689m, and its kin",
        )
    raise DinoError(
        f"{source} is none of DINO's networks (ViT-Ti, S or B with any patch size, ResNet-50) "
        "nor of DINOv2's (ViT-S, B, L or g, with or without registers)",
        f"its first keys are {', '.join(list(backbone)[:3])}; a checkpoint of this tool carries its own shape",
    )


def _dino(backbone: Mapping[str, Tensor]) -> BackboneConfig | None:
    sizes = _sizes(backbone, unplaced=0)
    blocks, heads = OFFICIAL.get(sizes["embed_dim"], (0, 0))
    if sizes["depth"] != blocks:
        return None
    return BackboneConfig(name="vit_small_patch16_224", options={**sizes, "num_heads": heads}, positions="dino")


def _dinov2(backbone: Mapping[str, Tensor]) -> BackboneConfig | None:
    registers = backbone["reg_token"].shape[1] if "reg_token" in backbone else 0
    sizes = _sizes(backbone, unplaced=1 if registers else 0)
    width, mlp = sizes["embed_dim"], [backbone.get(f"blocks.0.mlp.{layer}.weight") for layer in ("fc1", "fc2")]
    if width not in _HEADS or mlp[0] is None or mlp[1] is None:
        return None
    options: dict[str, bool | int | float | str] = {**sizes, "num_heads": _HEADS[width]}
    gated = len(mlp[0]) == 2 * mlp[1].shape[1]  # SwiGLU: one half of the first layer weighs the other
    if gated:
        options["mlp_ratio"] = (len(mlp[0]) + 0.5) / width  # timm rounds down what comes of it
    if registers:
        options["reg_tokens"] = registers
    size = "giant" if gated else "small"  # timm's one with SwiGLU, and one without
    return BackboneConfig(
        name=f"vit_{size}_patch14_{'reg4_' if registers else ''}dinov2",
        options=options,
        # The released code takes positions to other sizes as DINO's does, by (rows + 0.1) / 37 and not antialiased,
        # for the networks without registers; those with them were released later, antialiased to the exact size
        # (facebookresearch/dinov2@b8931f7 dinov2/hub/backbones.py). timm antialiases both.
        positions="antialias" if registers else "dino",
    )


def _sizes(backbone: Mapping[str, Tensor], *, unplaced: int) -> dict[str, int]:
    """What shapes tell, as timm names it; `unplaced` is 1 where the class token has no position of its own."""
    width, _, patch, _ = backbone["patch_embed.proj.weight"].shape
    side = round((backbone["pos_embed"].shape[1] - 1 + unplaced) ** 0.5)
    blocks = len({key.split(".")[1] for key in backbone if key.startswith("blocks.")})
    return {"embed_dim": width, "depth": blocks, "patch_size": patch, "img_size": side * patch}
