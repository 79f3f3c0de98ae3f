"""Loading: what a checkpoint, a file of others or a timm model holds, as an encoder or as weights to start from."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timm.models import adapt_input_conv

from dinocli.checksums import parse
from dinocli.data.images import ImagesConfig
from dinocli.encoder import Channels, Encoder, fingerprint
from dinocli.errors import DinoError
from dinocli.models.architecture import BackboneConfig, create_timm
from dinocli.models.backbone import Backbone, adapt
from dinocli.models.network import load_strictly
from dinocli.models.positions import Positions
from dinocli.official import official_architecture
from dinocli.preset import Preset
from dinocli.weights import Weights, Which, read_weights

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load_encoder(source: str, device: torch.device, which: Which = "teacher") -> Encoder:
    """Load an encoder.

    Args:
        source: A run folder, a `ckpt.safetensors`, an official `.pth` of DINO or DINOv2, or `timm:NAME` with that
            model's released weights.
        device: Where it is to compute.
        which: Of a file that holds both networks.

    Raises:
        DinoError: There is no such source, or its weights do not fit.
    """
    if not source.startswith("timm:"):
        return encoder_of(read_weights(Path(source), which), source, device)
    backbone, size, mean, std = _from_timm(source.removeprefix("timm:"))
    encoder = _frozen(backbone, source, device, size, mean, std)
    return replace(encoder, images=ImagesConfig(channels=encoder.channels))


def encoder_of(weights: Weights, source: str, device: torch.device) -> Encoder:
    """The encoder of weights that were read.

    Raises:
        DinoError: They are of no network that can be told, or do not fit it.
    """
    architecture = architecture_of(weights, source)
    backbone = architecture.build(drop_path=False)
    load_strictly(backbone.model, weights.backbone, source)
    if weights.preset is None:
        return _frozen(backbone, source, device, int(architecture.options.get("img_size", 224)), *_IMAGENET)
    return _of_preset(backbone, source, device, weights.preset)


def architecture_of(weights: Weights, source: str) -> BackboneConfig:
    """What to build for weights that were read: what their preset says, or which of the originals' networks they fit.

    Raises:
        DinoError: They carry no preset and are of none of the originals' networks.
    """
    return weights.preset.backbone if weights.preset else official_architecture(weights.backbone, source)


def _of_preset(backbone: Backbone, source: str, device: torch.device, preset: Preset) -> Encoder:
    views = preset.views
    encoder = _frozen(backbone, source, device, views.global_1.size, views.mean, views.std)
    return replace(encoder, images=preset.images)


def _frozen(backbone: Backbone, source: str, device: torch.device, size: int, mean: Channels, std: Channels) -> Encoder:
    backbone = backbone.eval().requires_grad_(False).to(device)
    return Encoder(backbone, source, fingerprint(backbone.model.state_dict()), size, mean, std)


def untrained_encoder(weights: Weights, device: torch.device, seed: int = 0) -> Encoder:
    """The encoder of a checkpoint's architecture before any training: the baseline that training has to beat.

    Raises:
        DinoError: The checkpoint is not this tool's own.
    """
    if weights.preset is None:
        raise DinoError(
            "an untrained twin needs a checkpoint of this tool", "take a ckpt.safetensors that `dino pretrain` wrote"
        )
    torch.manual_seed(seed)
    return _of_preset(weights.preset.backbone.build(drop_path=False), "untrained", device, weights.preset)


def initial_weights(source: str) -> Weights:
    """Weights to start training from: those of `read_weights`, or a timm model's released ones.

    Raises:
        DinoError: There is no such source.
    """
    if source.startswith("timm:"):
        return Weights(dict(_from_timm(source.removeprefix("timm:"))[0].model.state_dict()), {}, None)
    return read_weights(Path(source))


def fitted_to(weights: Weights, backbone: Backbone) -> Weights | None:
    """Weights of three channels for a backbone of another number, or None where nothing is to be done.

    The first layer's filters are added up for one channel, and repeated and scaled for several, so that its output
    keeps its size where all channels are alike.

    Source: timm's adapt_input_conv.
    """
    first = backbone.model.pretrained_cfg.get("first_conv")
    key = f"{first}.weight"
    own, given = backbone.model.state_dict().get(key), weights.backbone.get(key)
    if own is None or given is None or own.shape[1] == given.shape[1] or given.shape[1] != 3:
        return None
    return replace(weights, backbone=weights.backbone | {key: adapt_input_conv(own.shape[1], given)})


def _from_timm(name: str) -> tuple[Backbone, int, Channels, Channels]:
    # The hub's client tells of every retry; one sentence at the end is enough.
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    options: dict[str, Any] = {"pretrained": True}
    try:
        model = create_timm(name, **options)
    except DinoError:
        raise
    # The hub's client has dozens of ways to say that it cannot reach a file.
    except Exception as error:
        said = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]
        raise DinoError(
            f"the released weights of timm's {name} could not be had: {said}",
            "it takes the network once; without one, a folder with config.json and weights: timm:local-dir:FOLDER",
        ) from error
    released: Mapping[str, Any] = model.pretrained_cfg
    backbone = adapt(model, _positions_of(name, released))
    return backbone, released["input_size"][-1], tuple(released["mean"]), tuple(released["std"])


def _positions_of(name: str, released: Mapping[str, Any]) -> Positions:
    """How a timm model met other grids in its training: as the originals', or, where nothing tells, as timm does it."""
    # Those of DINO, and those of DINOv2 without registers, as `official_architecture` has them.
    as_dino = released.get("tag") == "dino" or (released.get("tag") == "lvd142m" and "_reg" not in name)
    return "dino" if as_dino else "antialias"


def timm_folder(folder: Path) -> dict[str, Any]:
    """What a folder in the form of timm's hub says of itself; `dinocli` stands in it if this tool exported it."""
    try:
        said = parse((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}
