"""Architecture: the backbone to build, its initialization and its learning rates."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from torch import nn

from dinocli.core.config import Config
from dinocli.core.errors import DinoError, nearest
from dinocli.models.backbone import Backbone
from dinocli.models.generic import GenericBackbone
from dinocli.models.positions import Positions
from dinocli.models.trained import ALL_WEIGHTS, Trained

# The functions that need timm import it: it takes as long as torch, and settings can be checked without it.


class LearningConfig(Config):
    """Learning rates of a backbone relative to the rest of the network.

    Attributes:
        layer_decay: Ratio of a block's learning rate to that of the next block. It applies once more to the layers
            before the first block. In networks without blocks it applies to their stages, once more to the last stage.
        patch_embed: Factor on the patch embedding's learning rate, on top of `layer_decay`.
        frozen_epochs: Initial epochs in which only the heads learn.
        trained: Trained weights of the backbone.

    Source: facebookresearch/dinov2@b8931f7 dinov2/utils/param_groups.py.
    """

    layer_decay: float = Field(1.0, gt=0, le=1)
    patch_embed: float = Field(1.0, gt=0)
    frozen_epochs: int = Field(0, ge=0)
    trained: Trained = ALL_WEIGHTS

    def rate(self, backbone: Backbone, parameter: str) -> float:
        """Return the factor on the learning rate of a parameter of a backbone's `model`, by its name."""
        rate: float = self.layer_decay ** (backbone.levels - backbone.level(parameter))
        return rate * (self.patch_embed if parameter.startswith("patch_embed.") else 1.0)


AS_THE_HEADS = LearningConfig()


Option = bool | int | float | str | tuple[int, ...]
_RESERVED = {"num_classes": "a backbone has no classifier", "pretrained": "--init loads released weights"}


class BackboneConfig(Config):
    """Backbone from timm, and its differences from timm's defaults.

    Attributes:
        name: timm's name of the architecture.
        options: Arguments for `timm.create_model` (patch size, image size, width, depth).
        drop_path: Share of residual branches that the student skips.
        drop_path_rule: Distribution of that share over the blocks: `linear` grows to it in the last block, as in the
            original; `uniform` is the same in all blocks and does not compute skipped branches, as in DINOv2.
        learning: Learning rates relative to the heads.
        positions: Interpolation of learned positions to other grids: `dino` as in the original (by a factor with 0.1
            added, no antialias), `bicubic` (to an exact size, no antialias), or `antialias` (to an exact size). None
            for networks without learned positions.
        rescale_positions: Largest random factor on the student's rotary coordinates; its inverse is the smallest, and 1
            means no rescaling.
        jitter_positions: Largest random factor on the rows of these coordinates, and another on the columns; 1 means no
            jitter.
        class_token_std: Standard deviation of the initial class token. None for networks without one.
        stem: Embedding of patches: `patch`, a linear map of each as in the original, or `conv`, two convolutions.
    """

    name: str
    options: dict[str, Option] = {}
    drop_path: float = Field(0.0, ge=0, lt=1)
    drop_path_rule: Literal["linear", "uniform"] = "linear"
    learning: LearningConfig = AS_THE_HEADS
    positions: Positions | None = None
    rescale_positions: float = Field(1.0, ge=1)
    jitter_positions: float = Field(1.0, ge=1)
    class_token_std: float | None = Field(None, gt=0)
    stem: Literal["patch", "conv"] = "patch"

    def of_weights(self) -> BackboneConfig:
        """Return the settings that weights belong to, without those of their training."""
        return BackboneConfig(name=self.name, options=self.options, positions=self.positions, stem=self.stem)

    def build(self, *, drop_path: bool) -> Backbone:
        """Build a backbone with fresh weights; `drop_path` is for the student only.

        Raises:
            DinoError: If timm has no model of this name, or an option is not possible.
        """
        from dinocli.models.transformer import RotaryBackbone

        options: dict[str, Any] = dict(self.options)
        for key, why in _RESERVED.items():
            if key in options:
                raise DinoError(f"backbone.options.{key} cannot be set: {why}", f"remove {key} from the options")
        if drop_path and self.drop_path and self.drop_path_rule == "linear":
            options["drop_path_rate"] = self.drop_path
        backbone = adapt(create_timm(self.name, **options), self.positions or "antialias")
        if self.stem == "conv":
            self._replace_embedding(backbone)
        if drop_path and self.drop_path and self.drop_path_rule == "uniform":
            backbone.leave_out(self.drop_path)
        if drop_path and self.rescale_positions != 1:
            backbone.rescale_positions(self.rescale_positions)
        if drop_path and self.jitter_positions != 1:
            backbone.jitter_positions(self.jitter_positions)
        # The initializations below replace timm's own.
        if isinstance(backbone, RotaryBackbone):
            backbone.start_evenly()
        if self.class_token_std is not None:
            self._start_tokens(backbone, self.class_token_std)
        return backbone

    def _replace_embedding(self, backbone: Backbone) -> None:
        from dinocli.models.transformer import Transformer

        if not isinstance(backbone, Transformer):
            raise DinoError(
                f"backbone.stem is conv; {self.name} has no patch embedding to replace",
                "--set backbone.stem=patch, or use a plain ViT such as vit_small_patch16_224",
            )
        backbone.use_conv_stem()

    def _start_tokens(self, backbone: Backbone, std: float) -> None:
        from dinocli.models.transformer import Transformer

        if not isinstance(backbone, Transformer):
            raise DinoError(
                f"backbone.class_token_std is {std}; {self.name} has no class token",
                "--set backbone.class_token_std=none",
            )
        for token in (backbone.model.cls_token, backbone.model.reg_token):
            if token is not None:
                nn.init.trunc_normal_(token, std=std)


def create_timm(name: str, **options: Any) -> Any:
    """Create a timm model without its classifier.

    Raises:
        DinoError: If timm has no model of this name, or rejects the options.
    """
    import timm

    architecture = name.split(".")[0]
    if ":" not in name and architecture not in timm.list_models():
        raise DinoError(
            f"timm {timm.__version__} has no model {name!r}", f"did you mean {nearest(name, timm.list_models())}?"
        )
    # Transformers with learned positions then accept images of any size; other networks reject the option.
    try:
        try:
            model = timm.create_model(name, num_classes=0, **{"dynamic_img_size": True} | options)
        except TypeError:
            return timm.create_model(name, num_classes=0, **options)
        # With that option timm refuses images whose last patch is incomplete, such as 384 pixels in patches of 14.
        sizes = (getattr(getattr(model, "patch_embed", None), key, None) for key in ("img_size", "patch_size"))
        size, patch = (value if isinstance(value, tuple) else (1,) for value in sizes)
        incomplete = any(side % part for side, part in zip(size, patch, strict=False))
        return timm.create_model(name, num_classes=0, **options) if incomplete else model
    except (TypeError, AssertionError, ValueError, ArithmeticError, RuntimeError) as error:
        remove = f"--set backbone.options=none, or options that {name} takes"
        raise DinoError(f"timm cannot build {name} with {options}: {error}", remove) from error


def adapt(model: Any, positions: Positions) -> Backbone:
    """Wrap a timm model in the backbone class that supports it.

    Raises:
        DinoError: If the model returns neither patch tokens nor a map for images.
    """
    from timm.layers import PatchEmbed  # type: ignore[attr-defined]
    from timm.models.vision_transformer import VisionTransformer

    from dinocli.models.transformer import RotaryBackbone, ViTBackbone

    # The exact type: subclasses (distilled, hybrid, ...) have other tokens in the sequence. Networks that pool their
    # patches have no norm after the class token.
    plain = type(model) is VisionTransformer and type(model.patch_embed) is PatchEmbed and model.cls_token is not None
    if plain and isinstance(model.fc_norm, nn.Identity):
        return ViTBackbone(model, positions)
    if RotaryBackbone.reads(model):
        return RotaryBackbone(model)
    try:
        return GenericBackbone(model)
    except DinoError:
        raise
    # Networks for other inputs fail on images in many ways.
    except Exception as error:
        raise DinoError(
            f"{type(model).__name__} does not take a batch of images: {(str(error).splitlines() or [''])[0][:100]}",
            "use one such as vit_small_patch16_224, vit_small_patch16_dinov3 or resnet50",
        ) from error
