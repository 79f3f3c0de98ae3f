"""DINO's XCiT files: their weights under timm's keys, and the architecture."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dinocli.models.architecture import BackboneConfig, Option
from dinocli.weights.released import IMAGENET, Preprocessing, Released

_PATCH_OF_CONVOLUTIONS = {3: 8, 4: 16}  # each convolution of the patch embedding halves the image


def read_xcit(backbone: Mapping[str, Tensor]) -> Released | None:
    """Return weights under XCiT's own keys in the form of timm, or None if they have other keys.

    Source: facebookresearch/xcit@82f5291 xcit.py; facebookresearch/dino@7c446df hubconf.py.
    """
    temperature = backbone.get("blocks.0.attn.temperature")
    if "cls_attn_blocks.0.attn.qkv.weight" not in backbone or temperature is None or "cls_token" not in backbone:
        return None
    tensors: dict[str, Tensor] = {}
    for key, value in backbone.items():
        key = key.replace("pos_embeder.", "pos_embed.", 1)
        if key.startswith("cls_attn_blocks.") and ".attn.qkv." in key:
            parts = zip("qkv", value.chunk(3), strict=True)
            tensors |= {key.replace(".qkv.", f".{part}."): share.clone() for part, share in parts}
        else:
            tensors[key] = value
    convolutions = sum(key.startswith("patch_embed.proj.") and key.endswith(".0.weight") for key in tensors)
    patch = _PATCH_OF_CONVOLUTIONS.get(convolutions, 16)
    options: dict[str, Option] = {
        "embed_dim": backbone["cls_token"].shape[-1],
        "depth": len({key.split(".")[1] for key in tensors if key.startswith("blocks.")}),
        "num_heads": len(temperature),
    }
    architecture = BackboneConfig(name=f"xcit_small_12_p{patch}_224", options=options)
    return Released(tensors, architecture, Preprocessing(224, *IMAGENET))
