"""Network: a backbone with named heads; the shape of student and teacher alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from dinocli.distributed import whole
from dinocli.errors import DinoError
from dinocli.models.backbone import Backbone, BackboneConfig, ViTBackbone
from dinocli.models.head import Head


@dataclass(frozen=True)
class Encoding:
    """What a network makes of V views of B images.

    Attributes:
        cls: The backbone's class tokens. [V, B, D]
        logits: What each head says of them, by its name. [V, B, K]
        hidden: What each head that reads patches says of the hidden ones, by its name. [M, K]
    """

    cls: Tensor
    logits: dict[str, Tensor]
    hidden: dict[str, Tensor] = field(default_factory=dict)


class Network(nn.Module):
    """A backbone and the heads on it."""

    def __init__(self, backbone: Backbone, heads: Mapping[str, Head]) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleDict(heads)
        self._compiled = False

    def forward(self, crops: Sequence[Tensor]) -> Encoding:
        """Encode groups of views, one group a resolution.

        Args:
            crops: A [V, B, C, H, W] for each resolution; V may differ, B may not.
        """
        # The backbone runs once a resolution, the heads once on everything: a head with BatchNorm must see all views.
        cls = torch.cat(
            [self.backbone.class_tokens(group.flatten(0, 1))[0].unflatten(0, group.shape[:2]) for group in crops]
        )
        logits = {name: head(cls.flatten(0, 1)).unflatten(0, cls.shape[:2]) for name, head in self.heads.items()}
        return Encoding(cls, logits)

    def _class_tokens(self, group: Tensor) -> Tensor:  # [V, B, C, H, W] -> [V, B, D]
        (cls,) = self.backbone.class_tokens(group.flatten(0, 1))
        return cls.unflatten(0, group.shape[:2])

    def prototypes(self, head: str) -> int:
        """K of a head."""
        return self.get_parameter(f"heads.{head}.last_layer.weight_v").shape[0]

    def blocks(self) -> list[nn.Module]:
        """The backbone's blocks in order; none of one that is no row of blocks."""
        return self.backbone.row

    def compile_blocks(self) -> None:
        """Let torch compile the backbone's blocks, once for each size of images that comes."""
        self.backbone.compile_blocks(any_batch=False)
        self._compiled = True

    def eager(self) -> AbstractContextManager[Any]:
        """Around uses at other sizes than those of training, for which compiling anew would not pay."""
        return torch.compiler.set_stance("force_eager") if self._compiled else nullcontext()

    def weights(self) -> dict[str, Tensor]:
        """All weights and buffers, under `backbone.<timm's key>` and `heads.<name>.<key>`; what is in shards, whole."""
        return {k.replace("backbone.model.", "backbone.", 1): whole(v) for k, v in self.state_dict().items()}

    def load_weights(self, weights: Mapping[str, Tensor], source: str) -> None:
        """Load what `weights` gave, exactly.

        Raises:
            DinoError: A key is missing, unknown, or of another shape.
        """
        load_strictly(self, {k.replace("backbone.", "backbone.model.", 1): v for k, v in weights.items()}, source)


def load_strictly(module: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Copy weights into a module, or say what does not fit and change nothing.

    Raises:
        DinoError: A key is missing, unknown, or of another shape; the line names the first one.
    """
    own = module.state_dict()
    for key, value in own.items():
        if key not in weights:
            raise _misfit(source, f"it lacks {key}")
        if weights[key].shape != value.shape:
            raise _misfit(source, f"{key} should be {_size(value)}; it is {_size(weights[key])}")
    unknown = next((k for k in weights if k not in own), None)
    if unknown is not None:
        raise _misfit(source, f"it also holds {unknown}, which has no place")
    module.load_state_dict(weights)


def _size(value: Tensor) -> str:
    return "x".join(map(str, value.shape)) or "a single number"


def _misfit(source: str, what: str) -> DinoError:
    return DinoError(
        f"the weights in {source} do not fit this network: {what}",
        "take the preset and the backbone that the weights were made with",
    )


def original_network(backbone: Backbone, name: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """What the original builds for a backbone's weights: its plain vision transformer, or torchvision's network.

    Args:
        backbone: Whose weights they are.
        name: timm's name of its architecture.

    Returns:
        The network with those weights in it, and how it makes features [B, D] of images.

    Raises:
        DinoError: It builds none with these weights.
    """
    if isinstance(backbone, ViTBackbone):
        options: dict[str, Any] = {"img_size": backbone.native_size, **backbone.shape}
        plain = BackboneConfig(name="vit_small_patch16_224", options=options, positions="dino").build(drop_path=False)
        network, forward = plain.model.eval(), lambda images: plain(images).cls
    elif name in torchvision.models.list_models():
        network = forward = torchvision.models.get_model(name).eval()
        network.fc = nn.Identity()
    else:
        raise DinoError(
            f"the original builds vision transformers and torchvision's networks; {name} is neither", "--to timm"
        )
    try:
        load_strictly(network, backbone.model.state_dict(), name)
    except DinoError as misfit:
        raise DinoError(f"the original has no such network: {misfit.message}", "--to timm") from misfit
    return network, forward
