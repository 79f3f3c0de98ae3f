"""Other timm networks as backbones: convolutional networks, and transformers with other blocks or tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dinocli.core.errors import DinoError
from dinocli.models.backbone import Backbone, Facet, MaskedPatches, Tokens

_AFTER_BLOCKS = (
    "cls_attn_blocks.",
    "norm.",
    "fc_norm.",
    "attn_pool.",
    "head.",
    "conv_head.",
    "norm_head.",
    "head_norm.",
    "bn2.",
)
Feature = Literal["token", "head", "mean"]


class GenericBackbone(Backbone):
    """timm network through its `forward_features` and `forward_head`: the output of its last block only.

    The class token is the network's own, after the final norm. A network without one, or without a norm after it, has
    the pooled output of timm's head instead, or the average over the map if the head changes its width. Patches are the
    remaining tokens, or the positions of a map.

    Attributes:
        feature: Source of `Tokens.cls`: the network's class `token`, its `head` without the classifier, or the `mean`
            of the map.

    Raises:
        DinoError: If the network returns neither patch tokens nor a map.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        height, width = model.pretrained_cfg["input_size"][-2:]
        if isinstance(size := getattr(getattr(model, "patch_embed", None), "img_size", None), tuple):
            height, width = size
        features, pooled = self._run_on_shapes(height, width)
        if not isinstance(features, Tensor):
            raise DinoError(
                f"{type(model).__name__} returns a {type(features).__name__}; expected patch tokens or a map",
                "use one such as vit_small_patch16_224, vit_small_patch16_dinov3 or resnet50",
            )
        self.width = int(getattr(model, "num_features", 0))
        self._prefix, self._maps = 0, features.ndim == 4
        if self._maps:
            # Some transformers keep channels last.
            self._channels_last = features.shape[1] != self.width and features.shape[-1] == self.width
            fits, rows = self.width in features.shape, features.shape[1 if self._channels_last else 2]
        else:
            count = features.shape[1] if features.ndim == 3 else 0
            own = getattr(model, "num_prefix_tokens", None)
            self._prefix = count - math.isqrt(count) ** 2 if own is None else int(own)
            patches = max(0, count - self._prefix)
            patch = math.isqrt(height * width // patches) if patches else 0
            rows = height // patch if patch else 0  # the native image need not be square
            fits = rows > 1 and rows * (width // patch) == patches and features.shape[-1] == self.width
        if not fits:
            raise DinoError(
                f"{type(model).__name__} returns {'x'.join(map(str, features.shape[1:]))} values per image; expected "
                "patch tokens or a map",
                "use one such as vit_small_patch16_224, vit_small_patch16_dinov3 or resnet50",
            )
        self.patch_size = height // rows
        has_token = (
            self._prefix > 0
            and getattr(model, "cls_token", None) is not None
            and getattr(model, "global_pool", None) != "map"
            and not isinstance(getattr(model, "norm", None), nn.Identity)
        )
        head_pools = pooled is not None and pooled.shape[1:] == (self.width,)
        self.feature: Feature = "token" if has_token else "head" if head_pools else "mean"
        norm = getattr(getattr(model, "head", None), "norm", None)
        # ConvNeXt's final norm comes after pooling; on each position it gives comparable patches.
        self._norm_of_map = self._maps and isinstance(norm, nn.LayerNorm)
        self._accepted = {(height, width)}

    def level(self, parameter: str) -> int:
        if not self.blocks:
            return self._stages.get(parameter, 0)
        if parameter.startswith("blocks."):
            return 1 + int(parameter.split(".")[1])
        after = parameter.startswith(_AFTER_BLOCKS)
        return len(self.blocks) + 1 if after else 0

    @property
    def levels(self) -> int:
        return super().levels if self.blocks else max(self._stages.values(), default=0) + 1

    @cached_property
    def _stages(self) -> dict[str, int]:
        """Stage of each parameter, as timm groups them for layer decay; empty for networks that it does not group."""
        from timm.models import group_parameters  # only here, as in `architecture`

        try:
            matcher = self.model.group_matcher(coarse=True)
        except (AttributeError, AssertionError):  # networks such as PiT have none, and RDNet's has no stages
            return {}
        stages: dict[str, int] = group_parameters(self.model, matcher, reverse=True)
        return stages

    def last_tokens(self, images: Tensor, last: int, masked: MaskedPatches | None = None) -> list[Tokens]:
        if masked is not None:
            raise DinoError(
                f"views.mask needs a plain vision transformer; {type(self.model).__name__} has no patches to mask",
                "--set views.mask=none",
            )
        if last != 1:
            raise DinoError(
                f"--blocks {last} is not supported: {type(self.model).__name__} gives only its output", "--blocks 1"
            )
        self._check_size(images)
        features = self.model.forward_features(images)
        patches, grid = self._split_patches(features, images)
        if self.feature == "token":
            cls = features[:, 0]
        else:
            cls = self.model.forward_head(features, pre_logits=True) if self.feature == "head" else patches.mean(1)
        registers = features[:, 1 : self._prefix] if self.feature == "token" else patches[:, :0]
        return [Tokens(cls, registers, patches, grid)]

    def _split_patches(self, features: Tensor, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Return patch tokens [B, N, D], and their rows and columns."""
        if not self._maps:
            grid = (images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size)
            return features[:, self._prefix :], grid
        if self._norm_of_map:
            features = self.model.head.norm(features)
        if not self._channels_last:
            features = features.permute(0, 2, 3, 1)
        return features.flatten(1, 2), (features.shape[1], features.shape[2])

    def _check_size(self, images: Tensor) -> None:
        """Check that the network accepts images of this size; timm's own errors name no remedy.

        Raises:
            DinoError: If it does not.
        """
        height, width = images.shape[-2:]
        # Sharded weights cannot run on shapes alone.
        sharded = hasattr(next(self.model.parameters()), "to_local")
        if torch.compiler.is_compiling() or sharded or (height, width) in self._accepted:
            return
        try:
            features, _ = self._run_on_shapes(height, width)
            fits = self._maps or features.shape[1] - self._prefix == (height // self.patch_size) * (
                width // self.patch_size
            )
        # The error's type depends on the network: AssertionError, RuntimeError, ValueError.
        except Exception:
            fits = False
        if not fits:
            native = max(side for side, _ in self._accepted)
            raise DinoError(
                f"{type(self.model).__name__} does not accept images of {height}x{width} pixels", f"--size {native}"
            )
        self._accepted.add((height, width))

    def _run_on_shapes(self, height: int, width: int) -> tuple[Tensor, Tensor | None]:
        """Return the shapes of features and pooled output for two images, without computing values."""
        probe = _Probe(self.model)
        state = {k: v.to("meta") for k, v in (*probe.named_parameters(), *probe.named_buffers())}
        convolutions = (module.in_channels for module in self.model.modules() if isinstance(module, nn.Conv2d))
        channels = getattr(self.model, "in_chans", None) or next(convolutions, 3)
        result: tuple[Tensor, Tensor | None] = functional_call(
            probe, state, (torch.zeros(2, channels, height, width, device="meta"),)
        )
        return result

    def patches(self, images: Tensor, layers: Sequence[int] = (-1,), facet: Facet = "token") -> Tensor:
        if tuple(layers) != (-1,) or facet != "token":
            raise DinoError(
                f"{type(self.model).__name__} gives only its output: no other layer, and no query, key or value",
                "--layer -1 --facet token",
            )
        (tokens,) = self.last_tokens(images, 1)
        return tokens.patches.unflatten(1, tokens.grid)

    def attention(self, images: Tensor, queries: slice = slice(0, 1)) -> Tensor:
        raise DinoError(
            f"attention maps need a plain vision transformer; this backbone is {type(self.model).__name__}",
            "use a checkpoint of a ViT preset such as vits16",
        )


class _Probe(nn.Module):
    """timm network that returns its features, and the output of its head without the classifier."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        features = self.model.forward_features(images)
        pools = isinstance(features, Tensor) and hasattr(self.model, "forward_head")
        return features, self.model.forward_head(features, pre_logits=True) if pools else None
