"""Architecture: which backbone to build, how it begins, and how it learns."""

from __future__ import annotations

from typing import Any, Literal

import timm
from pydantic import Field
from torch import nn

from dinocli.config import Config
from dinocli.errors import DinoError, nearest
from dinocli.models.backbone import Backbone, RotaryBackbone, Transformer, adapt
from dinocli.models.positions import Positions


class LearningConfig(Config):
    """How a backbone learns where it does not do so like the rest of the network.

    Attributes:
        layer_decay: The learning rate of a block is this times that of the next one; of what comes before the first
            block, once more.
        patch_embed: The learning rate of the patch embedding is this times what `layer_decay` gives it.
        frozen_epochs: Epochs at the start in which it does not learn, while the heads do.

    Source: facebookresearch/dinov2@b8931f7 dinov2/utils/param_groups.py.
    """

    layer_decay: float = Field(1.0, gt=0, le=1)
    patch_embed: float = Field(1.0, gt=0)
    frozen_epochs: int = Field(0, ge=0)


AS_THE_HEADS = LearningConfig()


class BackboneConfig(Config):
    """Which timm model, and what of it differs from timm's own.

    Attributes:
        name: timm's name of the architecture.
        options: Arguments for `timm.create_model` (patch size, image size, width, depth).
        drop_path: Share of residual branches that the student skips.
        drop_path_rule: How that share lies over the blocks: `linear`, growing to this in the last one, as in the
            original; or `uniform`, the same in all, left out so that they cost nothing, as in DINOv2.
        learning: How it learns, where not like the heads.
        positions: How learned positions meet another grid: `dino` as the original does (scaled by a factor with 0.1
            added, no antialias), or `antialias` (to an exact size). Absent for networks without positions.
        class_token_std: Spread of the class token at the start of training; absent where there is none.
    """

    name: str
    options: dict[str, bool | int | float | str] = {}
    drop_path: float = Field(0.0, ge=0, lt=1)
    drop_path_rule: Literal["linear", "uniform"] = "linear"
    learning: LearningConfig = AS_THE_HEADS
    positions: Positions | None = None
    rescale_positions: float = Field(1.0, ge=1)
    class_token_std: float | None = Field(None, gt=0)

    def build(self, *, drop_path: bool) -> Backbone:
        """A backbone with fresh weights; `drop_path` is for the student alone.

        Raises:
            DinoError: timm has no such model, or does not take the options.
        """
        options: dict[str, Any] = dict(self.options)
        if drop_path and self.drop_path and self.drop_path_rule == "linear":
            options["drop_path_rate"] = self.drop_path
        backbone = adapt(create_timm(self.name, **options), self.positions or "antialias")
        if drop_path and self.drop_path and self.drop_path_rule == "uniform":
            backbone.leave_out(self.drop_path)
        if drop_path and self.rescale_positions != 1:
            backbone.rescale_positions(self.rescale_positions)
        if isinstance(backbone, RotaryBackbone):
            backbone.start_evenly()
        if self.class_token_std is not None:
            if not isinstance(backbone, Transformer):
                raise DinoError(
                    f"{self.name} has no class token to start with a spread of {self.class_token_std}",
                    "--set backbone.class_token_std=none",
                )
            for token in (backbone.model.cls_token, backbone.model.reg_token):
                if token is not None:
                    nn.init.trunc_normal_(token, std=self.class_token_std)
        return backbone


def create_timm(name: str, **options: Any) -> Any:
    """A timm model without its classifier.

    Raises:
        DinoError: timm has no such model, or does not take the options.
    """
    architecture = name.split(".")[0]
    if ":" not in name and architecture not in timm.list_models():
        raise DinoError(
            f"timm {timm.__version__} has no model {name!r}", f"did you mean {nearest(name, timm.list_models())}?"
        )
    try:
        return timm.create_model(name, num_classes=0, **options)
    except (TypeError, AssertionError, ValueError, ArithmeticError, RuntimeError) as error:
        raise DinoError(f"timm cannot build {name} with {options}: {error}", "change [backbone.options]") from error
