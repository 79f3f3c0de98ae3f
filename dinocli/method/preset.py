"""Preset: the complete recipe of a run."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from dinocli.core.config import LARGEST, Config, change
from dinocli.core.device import TrainingPrecision
from dinocli.core.errors import DinoError
from dinocli.data.images import DEFAULTS, ImagesConfig
from dinocli.data.views.crops import ViewsConfig
from dinocli.engine.optim import OptimizerConfig
from dinocli.engine.schedules import Clock, Schedule
from dinocli.method import shipped, stages
from dinocli.method.classification import HEAD, Classification
from dinocli.method.distillation import SelfDistillation
from dinocli.method.feature_distillation import FeatureDistillation, Teacher
from dinocli.method.losses import LossesConfig
from dinocli.method.losses.gram import GramLossConfig
from dinocli.method.losses.targets import PrototypeLossConfig
from dinocli.models.architecture import BackboneConfig
from dinocli.models.backbone import Backbone
from dinocli.models.head import ClassifierHead, Head, HeadConfig
from dinocli.models.network import CLASS, Network, Reads

AnyMethod = SelfDistillation | FeatureDistillation | Classification


class AboutConfig(Config):
    """Description of a preset; nothing is computed from it.

    Attributes:
        recipe: Model and method in a few words.
        source: Origin of its numbers.
        command: Command that starts a run.
        cost: Time of a whole run, and the hardware for it.
        expected: Result to expect at the end, or a note that none was measured.
    """

    recipe: str
    source: str
    command: str
    cost: str
    expected: str


class TeacherConfig(Config):
    """Settings of the teacher.

    Attributes:
        momentum: Weight of the old average in each update of the student's moving average.
        frozen: If True, the teacher is a frozen, pretrained network. The average is then not used in training, but is
            still what a run exports. Without masks, iBOT is computed on all patches.
    """

    momentum: Schedule
    frozen: bool = False


class TrainingConfig(Config):
    """Length and batch size of a run.

    Attributes:
        epochs: Length of the run. Warm-ups and schedules are given in epochs too.
        steps_per_epoch: Steps per epoch. If None, an epoch shows each image once.
        batch_size: Images per step.
        precision: Precision of matrix products, if the device supports it natively; everything else is in float32. If
            bfloat16 is not native, CUDA devices use float16 with loss scaling, and others float32.
        seed: Seed of the initial weights, the order of the images and all random views.
    """

    epochs: int = Field(ge=1)
    steps_per_epoch: int | None = Field(None, ge=1)
    batch_size: int = Field(ge=1)
    precision: TrainingPrecision = "bfloat16"  # also for stored presets from before this key existed
    seed: int = Field(0, ge=0, lt=2**63)


# Values at which a schedule has no effect if it never leaves them.
_USELESS = {
    "optimizer.lr": (0.0, "nothing would be trained"),
    "teacher.momentum": (1.0, "the teacher would never change"),
    "losses.gram.weight": (0.0, "the Gram loss would have no effect"),
}


class Preset(Config):
    """Recipe of a run: architecture, views, losses, optimizer and length."""

    about: AboutConfig
    backbone: BackboneConfig
    heads: dict[str, HeadConfig]
    losses: LossesConfig
    teacher: TeacherConfig
    images: ImagesConfig = DEFAULTS
    views: ViewsConfig
    optimizer: OptimizerConfig
    training: TrainingConfig

    @model_validator(mode="before")
    @classmethod
    def _set_input_channels(cls, data: Any) -> Any:
        """Set timm's `in_chans` to `images.channels`, unless a stored preset already has both."""
        images, backbone = (data.get(key) for key in ("images", "backbone")) if isinstance(data, dict) else (None, None)
        channels = images.get("channels", 3) if isinstance(images, dict) else 3
        if channels == 3 or not isinstance(channels, int) or not isinstance(backbone, dict):
            return data
        options = backbone.get("options", {})
        options = {"in_chans": channels} | options if isinstance(options, dict) else options
        return data | {"backbone": backbone | {"options": options}}

    @model_validator(mode="after")
    def _check_channels(self) -> Self:
        channels, views = self.images.channels, self.views
        counted = f"images have {channels} channel{'s' if channels > 1 else ''}"
        if (inputs := self.backbone.options.get("in_chans", 3)) != channels:
            raise ValueError(
                f"backbone.options.in_chans is {inputs} and images.channels {channels}; "
                f"it needs images.channels={inputs}"
            )
        if (len(views.mean), len(views.std)) != (channels, channels):
            raise ValueError(
                f"{counted}, views.mean has {len(views.mean)} values and views.std {len(views.std)}; it needs "
                "views.mean=[...] and views.std=[...], as measured by `dino doctor IMAGES --set "
                f"images.channels={channels}`"
            )
        if channels != 3 and views.color_keys:
            off = " --set ".join(f"views.{key}=0" for key in views.color_keys)
            raise ValueError(
                f"views.{views.color_keys[0]} changes colors, which needs 3 channels; {counted}; it needs {off}"
            )
        return self

    @model_validator(mode="after")
    def _check_views(self) -> Self:
        first, second = self.views.global_1, self.views.global_2
        if second and second.size != first.size:
            raise ValueError(
                f"the global views have sizes {first.size} and {second.size}; expected one size; "
                f"it needs views.global_2.size={first.size}"
            )
        if len(self.views.all) < 2 and not (self.losses.features or self.losses.labels):
            raise ValueError(
                "the preset has one view; expected at least two, to predict one from another; it needs views.locals=2"
            )
        if self.images.pair_within is not None and second is None:
            raise ValueError(
                f"images.pair_within is {self.images.pair_within:g}, and there is no second global view to cut from "
                "another frame; it needs images.pair_within=none"
            )
        of_patches = [name for name, loss in self.losses.with_heads().items() if loss.reads == "patches"]
        if of_patches and not self.views.mask and not self.teacher.frozen:
            raise ValueError(
                f"losses.{of_patches[0]} needs masked patches, and views.mask is not set; it needs "
                "views.mask={share=0.5, ratio=[0.1, 0.5], smallest=4, aspect=[0.3, 3.33]}"
            )
        if self.losses.ibot and self.losses.ibot.visible and not self.views.mask:
            raise ValueError(
                f"losses.ibot.visible is {self.losses.ibot.visible:g}, and views.mask is not set: without masks all "
                "patches count equally; it needs losses.ibot.visible=0"
            )
        return self

    @model_validator(mode="after")
    def _check_whole_views(self) -> Self:
        """Check that a preset of feature distillation or classification has nothing that its method does not use."""
        alone = next((name for name in ("features", "labels") if getattr(self.losses, name)), None)
        if alone is None:
            return self
        others = [f"losses.{name}" for name in self.losses.present() if name != alone]
        unused = others + [f"heads.{name}" for name in self.heads]
        unused += [f"views.{name}" for name in ("local", "mask", "low_resolution") if getattr(self.views, name)]
        unused += ["views.global_2"] if alone == "labels" and self.views.global_2 else []
        if unused:
            off = " --set ".join(f"{key}=none" for key in unused)
            raise ValueError(f"losses.{alone} reads whole views alone and excludes {', '.join(unused)}; it needs {off}")
        if alone == "labels" and self.teacher.frozen:
            raise ValueError("losses.labels has no teacher; it needs teacher.frozen=false")
        return self

    @model_validator(mode="after")
    def _check_features(self) -> Self:
        if not self.losses.features:
            return self
        if not self.losses.features.weights:
            raise ValueError("all weights of losses.features are 0; it needs losses.features.class_cosine=1.0")
        if not self.teacher.frozen:
            raise ValueError("losses.features needs frozen teachers; it needs teacher.frozen=true")
        return self

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        for name, head in self.heads.items():
            if head.prototypes is not None and head.norm_last_layer is None:
                raise ValueError(
                    f"heads.{name} has prototypes, and norm_last_layer is not set; it needs "
                    f"heads.{name}.norm_last_layer=true"
                )
            of_prototypes = [key for key in ("norm_last_layer", "freeze_last_layer_epochs") if getattr(head, key)]
            if head.prototypes is None and of_prototypes:
                raise ValueError(
                    f"heads.{name}.{of_prototypes[0]} is set, and the head has no prototypes; it needs "
                    f"heads.{name}.{of_prototypes[0]}=none"
                )
        return self

    @model_validator(mode="after")
    def _check_losses(self) -> Self:
        if not self.losses.present():
            raise ValueError("a run needs at least one loss, such as [losses.dino]")
        for name, loss in self.losses.with_heads().items():
            if loss.head not in self.heads:
                raise ValueError(f"losses.{name}.head is {loss.head!r}; the heads are {', '.join(self.heads)}")
            prototypes = self.heads[loss.head].prototypes
            if isinstance(loss, PrototypeLossConfig) and prototypes is None:
                raise ValueError(
                    f"losses.{name} needs prototypes, and heads.{loss.head} has none; it needs "
                    f"heads.{loss.head}={{prototypes=65536, norm_last_layer=true, hidden=2048, bottleneck=256, "
                    "layers=3}"
                )
            if not isinstance(loss, PrototypeLossConfig) and prototypes is not None:
                raise ValueError(
                    f"losses.{name} compares features, and heads.{loss.head} has {prototypes} prototypes; it needs "
                    f"heads.{loss.head}={{hidden=2048, bottleneck=256, layers=3}}"
                )
        images = self.training.batch_size
        if not all(abs(value) <= LARGEST for value in self.optimizer.lr_for(images).bounds):
            name = "start" if hasattr(self.optimizer.lr, "start") else "value"
            raise ValueError(
                f"optimizer.lr_rule makes optimizer.lr infinite at a batch of {images}; it needs "
                f"optimizer.lr.{name}=0.0005"
            )
        return self

    @model_validator(mode="after")
    def _check_schedules(self) -> Self:
        # Smallest, largest and usual value.
        valid = {"optimizer.lr": (0.0, math.inf, 0.0005), "optimizer.weight_decay": (0.0, math.inf, 0.04)}
        valid |= {"teacher.momentum": (0.0, 1.0, 0.996), "losses.gram.weight": (0.0, math.inf, 2.0)}
        for key, schedule in self.schedules.items():
            low, high, usual = valid.get(key, (1e-6, math.inf, 0.04))
            values = {name: getattr(schedule, name) for name in ("value", "start", "end") if hasattr(schedule, name)}
            for name, value in values.items():
                if not low <= value <= high:
                    expected = f"from {low:g} to {high:g}" if high < math.inf else f"{low:g} or more"
                    raise ValueError(f"{key}.{name} is {value:g}; expected {expected}; it needs {key}.{name}={usual}")
            warmup = getattr(schedule, "warmup_epochs", 0)
            if low > 0 and warmup:
                raise ValueError(
                    f"{key}.warmup_epochs is {warmup}, and a temperature cannot start from 0; expected 0; it needs "
                    f"{key}.warmup_epochs=0"
                )
            useless, effect = _USELESS.get(key, (-1.0, ""))
            if set(values.values()) == {useless}:
                name = next(iter(values))
                raise ValueError(f"{key} is always {useless:g}, and {effect}; it needs {key}.{name}={usual}")
        return self

    @property
    def schedules(self) -> dict[str, Schedule]:
        """Schedules of the recipe, by key."""
        with_targets = self.losses.with_targets().items()
        return {
            "optimizer.lr": self.optimizer.lr,
            "optimizer.weight_decay": self.optimizer.weight_decay,
            "teacher.momentum": self.teacher.momentum,
            **{f"losses.{name}.targets.temperature": loss.targets.temperature for name, loss in with_targets},
            **({"losses.gram.weight": self.losses.gram.weight} if self.losses.gram else {}),
        }

    @model_validator(mode="after")
    def _check_low_resolution_phase(self) -> Self:
        views, low, epochs = self.views, self.views.low_resolution, self.training.epochs
        if low is None:
            return self
        if low.epochs >= epochs:
            override = f"low_resolution.epochs={epochs // 2}" if epochs > 1 else "low_resolution=none"
            raise ValueError(
                f"views.low_resolution.epochs is {low.epochs} in a run of {epochs}; expected fewer; "
                f"it needs views.{override}"
            )
        if low.local_size and not (views.local and views.locals):
            raise ValueError(
                f"views.low_resolution.local_size is {low.local_size}, and there are no local views; "
                "it needs views.low_resolution.local_size=none"
            )
        return self

    @model_validator(mode="after")
    def _check_mixed_sizes(self) -> Self:
        views = self.views
        if views.mixed and views.low_resolution:
            raise ValueError(
                "views.mixed and views.low_resolution both set the size of the crops; it needs "
                "views.low_resolution=none"
            )
        if any(each.local_size for each in views.mixed) and not (views.local and views.locals):
            raise ValueError(
                "views.mixed has a local_size, and there are no local views; it needs "
                f"views.mixed=[{{global_size={views.mixed[0].global_size}, share=1.0}}]"
            )
        return self

    def network(self, *, drop_path: bool = False) -> Network:
        """Build a network with fresh weights."""
        backbone = self.backbone.build(drop_path=drop_path)
        heads: dict[str, Head | ClassifierHead]
        heads = {name: head.build(backbone.width) for name, head in self.heads.items()}
        if self.losses.labels:
            heads[HEAD] = ClassifierHead(backbone.width, self.losses.labels.classes)
        return Network(backbone, heads, self.reads, masking=self.views.mask is not None)

    @property
    def reads(self) -> dict[str, frozenset[Reads]]:
        """Tokens that each head reads: class tokens, patches or both."""
        with_heads = self.losses.with_heads().values()
        return {name: frozenset(loss.reads for loss in with_heads if loss.head == name) or CLASS for name in self.heads}

    def method(self, frozen: Network | None = None) -> SelfDistillation:
        """Build student and moving average with the same fresh weights, and the losses.

        Args:
            frozen: Frozen teacher. If None, the average is the teacher.

        Raises:
            DinoError: If timm cannot build the backbone, a size of `views.low_resolution` or `views.mixed` does not fit
                it, it gives no patches that `losses.gram` could compare, or the losses compare features, which needs
                `feature_method`.
        """
        if self.losses.features:
            raise DinoError("losses.features needs teachers, and --teacher is not set", "--teacher timm:NAME")
        if self.losses.labels:
            raise DinoError("losses.labels needs the labels of the images", "dino finetune IMAGES --from WEIGHTS")
        student, average = self.network(drop_path=True), self.network()
        _check_low_resolution_sizes(self.views, student.backbone)
        _check_mixed_sizes(self.views, student.backbone)
        gram = None
        if self.losses.gram:
            gram = Network(self.backbone.build(drop_path=False), {})
            gram.load_state_dict({k: v for k, v in average.state_dict().items() if k.startswith("backbone.")})
            _check_gram(self.losses.gram, self.views, self.backbone)
        return SelfDistillation(
            student, average, self.losses, self.teacher.momentum, self.backbone.learning, frozen, gram
        )

    def feature_method(self, teachers: Sequence[Teacher]) -> FeatureDistillation:
        """Build student and moving average with the same fresh weights, and the adaptors to the teachers' features.

        Raises:
            DinoError: If timm cannot build the backbone.
        """
        assert self.losses.features is not None
        student, average = self.network(drop_path=True), self.network()
        loss, momentum, learning = self.losses.features, self.teacher.momentum, self.backbone.learning
        return FeatureDistillation(student, average, teachers, loss, momentum, self.views, learning)

    def label_method(self, labels: Tensor) -> Classification:
        """Build student and moving average with the same fresh weights, and the labels that they learn.

        Args:
            labels: Labels of all images of the source, as `Classification` takes them.

        Raises:
            DinoError: If timm cannot build the backbone.
        """
        assert self.losses.labels is not None
        student, average = self.network(drop_path=True), self.network()
        loss, momentum = self.losses.labels, self.teacher.momentum
        return Classification(student, average, loss, momentum, labels, self.backbone.learning)

    @property
    def clean_scale(self) -> float | None:
        """Side of the clean crops that a loss needs, relative to the global crops'. None if no loss needs any."""
        return self.losses.gram.scale if self.losses.gram else None


def _check_gram(gram: GramLossConfig, views: ViewsConfig, config: BackboneConfig) -> None:
    """Check that a backbone gives patches, and that the Gram teacher's crops are whole patches."""
    for each in views.variants:
        size = each.global_1.size
        with torch.device("meta"):  # shapes only, which takes no time
            backbone = config.build(drop_path=False).eval()
            patches = backbone(torch.empty(1, views.channels, size, size)).patches.shape[1]
        if patches < 2:
            raise DinoError(
                f"losses.gram compares the patches of a crop; {config.name} gives "
                f"{'one' if patches else 'no'} patch{'' if patches else 'es'} at {size} pixels",
                "--set losses.gram=none"
                + (f", or --set views.global_1.size={2 * size} with views.global_2.size" if patches else ""),
            )
        patch = backbone.patch_size if backbone.grid(size) else 1
        if (larger := each.clean_size(gram.scale)) % patch:
            # One scale must fit all sizes, and a whole one does.
            fits = max(1.0, round(gram.scale) if views.mixed else round(larger / patch) * patch / size)
            raise DinoError(
                f"losses.gram.scale is {gram.scale:g}: crops of {larger} pixels for the Gram teacher are not a whole "
                f"number of patches of {patch} pixels",
                f"--set losses.gram.scale={fits:g}",
            )


def _check_mixed_sizes(views: ViewsConfig, backbone: Backbone) -> None:
    for i, mix in enumerate(views.mixed):
        patch = backbone.patch_size if backbone.grid(mix.global_size) else 1
        for key, size in (("global_size", mix.global_size), ("local_size", mix.local_size or patch)):
            if size % patch:
                fits = max(1, round(size / patch)) * patch
                raise DinoError(
                    f"views.mixed has a {key} of {size}; expected a whole number of patches of {patch} pixels",
                    f"use {key}={fits} in table {i + 1} of views.mixed",
                )


def _check_low_resolution_sizes(views: ViewsConfig, backbone: Backbone) -> None:
    low, full = views.low_resolution, {"global_size": views.global_1.size}
    if low is None:
        return
    # A convolutional network takes any size.
    patch = backbone.patch_size if backbone.grid(low.global_size) else 1
    whole = f" and a whole number of patches of {patch} pixels" if patch > 1 else ""
    for key, size in (full | ({"local_size": views.local.size} if views.local else {})).items():
        low_size = getattr(low, key)
        if low_size and (low_size >= size or low_size % patch):
            valid = (low_size if low_size < size else size // 2) // patch * patch
            disabled = ".local_size=none" if key == "local_size" else "=none"
            raise DinoError(
                f"views.low_resolution.{key} is {low_size}; expected less than the full {size}{whole}",
                f"--set views.low_resolution{f'.{key}={valid}' if valid >= 8 else disabled}",
            )


def load_preset(
    name: str,
    overrides: Iterable[str] = (),
    run: Preset | None = None,
    peak_lr: float = 0.0,
    clock: Clock | None = None,
) -> Preset:
    """Load a shipped preset by its name, or a user's own by its path, and apply overrides.

    Args:
        name: Name such as `vits16`, or a path that ends in `.toml`.
        overrides: Overrides `key.path=value` with a TOML value; a bare word is a string, and `none` removes the key.
        run: Preset of the run to continue, which a stage needs. A complete preset does not use it.
        peak_lr: Highest learning rate of the first run before a stage. If 0, that of `run`.
        clock: Clock at the last step of `run`. If None, it completed its schedules.

    Raises:
        DinoError: If the preset does not exist or is not valid, or is a stage and there is no run.
    """
    if name.endswith(".toml"):
        path = Path(name)
        if not path.is_file():
            stem = path.stem
            use_shipped = (
                f"use --preset {stem}, which ships with dino" if stem in (*shipped.names(), *shipped.stages()) else ""
            )
            listed = ", ".join(shipped.names())
            raise DinoError(f"the preset file {name} does not exist", use_shipped or f"shipped presets are {listed}")
        text = path.read_text(encoding="utf-8", errors="replace")
    else:
        text = shipped.text(name)
    try:
        data = tomllib.loads(text)
    except RecursionError as error:
        raise DinoError(f"{name} is nested too deeply for a preset", "check its brackets") from error
    except ValueError as error:
        raise DinoError(f"{name} is not valid TOML: {error}", "correct that line") from error
    if "stage" in data:
        if run is None:
            raise stages.refuse_alone(name)
        data = stages.continued(data, run, peak_lr or max(run.optimizer.lr.bounds), f"preset {name}", clock)
    for override in overrides:
        change(data, override)
    if run is not None and isinstance(images := data.get("images", {}), dict):
        # Before the preset is checked as a whole: its error on other channels would ask for their mean and std.
        stages.check_channels(images.get("channels", 3), run)
    return Preset.parse(data, f"preset {name}")
