"""Facts on timm's networks as backbones, from their shapes alone."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import timm
import torch

from dinocli.core.errors import DinoError, nearest
from dinocli.models.architecture import adapt, create_timm
from dinocli.models.generic import Feature, GenericBackbone


@dataclass(frozen=True)
class CatalogEntry:
    """Network of timm.

    Attributes:
        name: timm's name of the architecture.
        parameters: Number of parameters without a classifier.
        patch_size: Side of a patch, or stride of the map, in pixels; 0 if the network is not supported.
        width: Width of the features.
        feature: Source of the feature of an image; see `GenericBackbone`.
        masks: Support for masked patches, which iBOT, DINOv2 and DINOv3 need.
        released: Tags of the weights that timm offers, as in `timm:NAME.TAG`.
        reason: Reason why the network is not supported; empty if it is.
    """

    name: str
    parameters: int
    patch_size: int
    width: int
    feature: Feature | Literal["none"]
    masks: bool
    released: tuple[str, ...]
    reason: str = ""


def find_names(pattern: str) -> Sequence[str]:
    """Return timm's names that match a pattern with wildcards, or contain a text without any.

    The pattern may also be a name with its weights, as in `timm:NAME.TAG`.

    Raises:
        DinoError: If there is none.
    """
    known = timm.list_models()
    name = pattern.removeprefix("timm:")
    if name in timm.list_models(pretrained=True):
        name = name.partition(".")[0]
    found = fnmatch.filter(known, name if any(sign in name for sign in "*?[") else f"*{name}*")
    if not found:
        raise DinoError(
            f"timm {timm.__version__} has no model that matches {pattern!r}",
            f"dino presets backbones '{nearest(pattern.strip('*'), known)}'",
        )
    return found


def inspect_network(name: str) -> CatalogEntry:
    """Build a network without memory for its weights, and return its facts."""
    released = tuple(full.partition(".")[2] for full in timm.list_models(f"{name}.*", pretrained=True))
    parameters = 0
    try:
        with torch.device("meta"):
            model = create_timm(name)
        parameters = sum(value.numel() for value in model.parameters())
        backbone = adapt(model, "antialias")
    except DinoError as error:
        return CatalogEntry(name, parameters, 0, 0, "none", False, released, error.message)
    feature = backbone.feature if isinstance(backbone, GenericBackbone) else "token"
    return CatalogEntry(
        name,
        parameters,
        backbone.patch_size,
        backbone.width,
        feature,
        backbone.grid(backbone.patch_size) is not None,
        released,
    )
