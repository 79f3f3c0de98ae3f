"""Starting point of an adaptation: released weights, with their architecture, kind and preprocessing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dinocli.core.errors import DinoError
from dinocli.data.images import DEFAULTS, ImagesConfig
from dinocli.models.architecture import BackboneConfig
from dinocli.weights.checkpoint import Weights, read_weights
from dinocli.weights.identify import config_of
from dinocli.weights.load import LOCAL, architecture_of, load_timm, note_on_heads, of_timm, preprocessing_of
from dinocli.weights.official import HEADS
from dinocli.weights.released import Preprocessing

Family = Literal["dinov2", "dinov3", "other"]


@dataclass(frozen=True)
class StartingPoint:
    """Released weights to start from.

    Attributes:
        source: Source of the weights, as the user named it.
        architecture: Architecture of the backbone.
        preprocessing: Images that it expects.
        family: Method that suits it: DINOv2's losses, DINOv3's, or DINO's alone.
        weights: The weights, on the CPU, so that a run need not read them again.
        images: Settings for decoding image files, as in training.
        notes: Assumptions made in reading the weights, for the user to check.
    """

    source: str
    architecture: BackboneConfig
    preprocessing: Preprocessing
    family: Family
    weights: Weights
    images: ImagesConfig = DEFAULTS
    notes: tuple[str, ...] = ()


def read_starting_point(source: str, overrides: Sequence[str] = ()) -> StartingPoint:
    """Read the weights and the facts of a run, a weights file, a transformers folder or a timm model.

    Args:
        source: Source of the weights.
        overrides: `backbone.options.num_heads=N`, for a file that does not store it; other settings are ignored.

    Raises:
        DinoError: If the source does not exist or is not a network that this tool reads.
    """
    if source.startswith("timm:"):
        name = source.removeprefix("timm:")
        backbone, preprocessing = load_timm(name)
        positions = getattr(backbone, "positions", None)
        architecture = _timm_architecture(name).model_copy(update={"positions": positions})
        return StartingPoint(source, architecture, preprocessing, _family(architecture, None), of_timm(backbone))
    weights = read_weights(Path(source))
    heads = [override for override in overrides if override.strip().startswith(HEADS.removeprefix("--set "))]
    architecture = architecture_of(weights, source, [] if weights.architecture else heads)
    plain = architecture.of_weights()
    note = note_on_heads(weights, architecture, source, heads)
    return StartingPoint(
        source,
        plain,
        preprocessing_of(weights, architecture, source),
        _family(plain, weights),
        weights,
        weights.preset.images.unpaired if weights.preset else DEFAULTS,
        (*weights.notes, *([note] if note else [])),
    )


def _timm_architecture(name: str) -> BackboneConfig:
    import timm

    architecture: str
    if name.startswith(LOCAL):
        config = config_of(Path(name.removeprefix(LOCAL)))
        architecture, options = config.get("architecture", ""), config.get("model_args") or {}
    elif name.startswith(("hf-hub:", "hf_hub:")):
        _, architecture, options = timm.models.load_model_config_from_hf(name.partition(":")[2])
    else:
        return BackboneConfig(name=name.partition(".")[0])
    # A backbone has no classifier, but timm's save_for_hf stores the number of its classes.
    kept = {key: value for key, value in (options or {}).items() if key != "num_classes"}
    return BackboneConfig.parse({"name": architecture, "options": kept}, f"timm:{name}")


def _family(architecture: BackboneConfig, weights: Weights | None) -> Family:
    trained = weights.preset.losses if weights and weights.preset else None
    if trained and trained.ibot is None:
        return "other"
    if "dinov3" in architecture.name and not architecture.name.startswith("convnext"):
        return "dinov3"
    return "dinov2" if trained or "dinov2" in architecture.name else "other"


def refuse_other_channels(start: StartingPoint, channels: int) -> None:
    """Check that weights take images with this number of channels.

    Raises:
        DinoError: If they do not.
    """
    if len(start.preprocessing.mean) != channels:
        raise DinoError(
            f"--from {start.source} takes {len(start.preprocessing.mean)} channels; images.channels is {channels}",
            "remove images.channels, or dino pretrain --preset adapt-lora --init, which adapts the first layer",
        )
