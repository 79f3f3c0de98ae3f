"""Feature distillation: the student predicts the features of frozen teachers, which need no heads."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinocli.data.loader.batch import Batch
from dinocli.data.views.crops import ViewsConfig
from dinocli.engine.method import Method, ParamGroup, group_parameters
from dinocli.engine.schedules import Clock, Schedule
from dinocli.method.losses.features import (
    FeaturesLossConfig,
    Moments,
    Standardizer,
    cosine_distance,
    match_grid,
    smooth_l1_distance,
)
from dinocli.models.architecture import AS_THE_HEADS, LearningConfig
from dinocli.models.backbone import Backbone, Tokens
from dinocli.models.network import Network


@dataclass(frozen=True)
class Teacher:
    """Frozen encoder that teaches.

    Attributes:
        backbone: Backbone with its weights.
        mean: Mean of each channel in its training data.
        std: Standard deviation of each channel in its training data.
        size: Side of the views that it sees, in pixels.
        grid: Rows and columns of its patches at this size.
    """

    backbone: Backbone
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int
    grid: tuple[int, int]


@dataclass(frozen=True)
class Target:
    """Standardized features of a teacher for V views of b images.

    Attributes:
        cls: Class tokens. [V, b, D]
        patches: Patches. [V, b, N, D]
    """

    cls: Tensor
    patches: Tensor

    def split(self, count: int) -> list[Target]:
        """Split the images into `count` targets of the same size, in order."""
        return [Target(*pair) for pair in zip(self.cls.chunk(count, 1), self.patches.chunk(count, 1), strict=True)]


@dataclass(frozen=True)
class FeaturePart:
    """Part of a batch, with the features that the student has to predict.

    Attributes:
        batch: Views of b images.
        targets: Features of each teacher.
    """

    batch: Batch
    targets: list[Target]


class TeacherNetwork(nn.Module):
    """Teacher that takes the student's views: it resizes them, and replaces their normalization by its own."""

    scale: Tensor
    shift: Tensor

    def __init__(self, teacher: Teacher, views: ViewsConfig) -> None:
        super().__init__()
        self.network = Network(teacher.backbone, {})
        self.size = teacher.size
        ours, theirs = (
            [torch.tensor(values, dtype=torch.float64)[:, None, None] for values in pair]
            for pair in ((views.mean, views.std), (teacher.mean, teacher.std))
        )
        # (x * our std + our mean - their mean) / their std
        self.register_buffer("scale", (ours[1] / theirs[1]).float(), persistent=False)
        self.register_buffer("shift", ((ours[0] - theirs[0]) / theirs[1]).float(), persistent=False)

    def forward(self, views: Tensor) -> Tokens:  # [B, C, H, W]
        tokens: Tokens = self.network.backbone(resized(views, self.size) * self.scale + self.shift)
        return tokens


class FeatureDistillation(Method):
    """Distillation of the features of frozen teachers into a student of any architecture.

    For each teacher, one adaptor predicts its class token from the student's and another its patches. The predicted map
    is interpolated to the teacher's grid. The losses are averages over the teachers, whose features are standardized,
    so that none dominates.

    Args:
        student: Network that the gradient trains, without heads.
        average: Network of the same shape, which becomes the student's moving average: the product of a run.
        teachers: Frozen encoders.
        loss: Distances, adaptors and standardization.
        momentum: Weight of the old average in each update.
        views: Views of the student, with their normalization.
        learning: Learning rates of the backbone relative to the adaptors.

    Attributes:
        teachers: Teachers as networks. Empty if `stored` replaces them.
        stored: Function from rows of a feature cache to the teachers' features. If None, the teachers compute them.

    Source: AM-RADIO, arXiv 2312.06709.
    """

    def __init__(
        self,
        student: Network,
        average: Network,
        teachers: Sequence[Teacher],
        loss: FeaturesLossConfig,
        momentum: Schedule,
        views: ViewsConfig,
        learning: LearningConfig = AS_THE_HEADS,
    ) -> None:
        super().__init__()
        self.student, self.average = student, average
        _freeze_unused(student.backbone, views)
        average.requires_grad_(False).load_state_dict(student.state_dict())
        self.loss, self.momentum, self.learning = loss, momentum, learning
        self.size, self.grids = views.global_1.size, [teacher.grid for teacher in teachers]
        tokens = {"class": any(n.startswith("class") for n in loss.weights)}
        tokens["patch"] = any(n.startswith("patch") for n in loss.weights)
        self.adaptors = nn.ModuleList(
            nn.ModuleDict(
                {
                    kind: loss.adaptor.build(student.backbone.width, teacher.backbone.width)
                    for kind, used in tokens.items()
                    if used
                }
            )
            for teacher in teachers
        )
        self.standardizers = nn.ModuleList(Standardizer(teacher.backbone.width) for teacher in teachers)
        self.teachers = nn.ModuleList(TeacherNetwork(teacher, views) for teacher in teachers)
        self.teachers.requires_grad_(False).eval()
        self.stored: Callable[[Tensor], list[Target]] | None = None

    @property
    def networks(self) -> list[Network]:
        """Networks that a step runs."""
        return [self.student, *(teacher.network for teacher in self.teachers)]  # type: ignore[list-item]

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.teachers.eval()  # so that its output for an image does not depend on the other images
        self.average.eval()
        return self

    def frozen_modules(self) -> list[str]:
        return ["teachers"]

    @torch.no_grad()
    def fit_standardizers(self, batches: Iterable[Batch], precision: AbstractContextManager[Any] | None = None) -> None:
        """Set the mean and standard deviation of each teacher's features to those over some batches.

        Args:
            batches: Batches, which are loaded outside of `precision`: it would also round their blur.
            precision: Autocast context of the teachers. If None, they compute in float32.
        """
        moments = [(Moments(), Moments()) for _ in self.teachers]
        for batch in batches:
            for teacher, (cls, patches) in zip(self.teachers, moments, strict=True):
                with precision or nullcontext():
                    tokens: Tokens = teacher(batch.global_crops.flatten(0, 1))
                cls.add(tokens.cls)
                patches.add(tokens.patches.flatten(0, 1))
        for standardizer, found in zip(self.standardizers, moments, strict=True):
            standardizer.fit(*found)  # type: ignore[operator]

    @torch.no_grad()
    def targets(self, batch: Batch) -> list[Target]:
        """Return the standardized features of each teacher for all views of a batch."""
        crops, shape = batch.global_crops.flatten(0, 1), batch.global_crops.shape[:2]
        targets = []
        for teacher, standardizer in zip(self.teachers, self.standardizers, strict=True):
            tokens: Tokens = teacher(crops)
            cls, patches = standardizer(tokens.cls, tokens.patches)
            targets.append(Target(cls.unflatten(0, shape), patches.unflatten(0, shape)))
        return targets

    @torch.no_grad()
    def prepare(self, batch: Batch) -> Batch | FeaturePart:
        """Return a batch, with the teachers' features if they are stored."""
        if self.stored is None:
            return batch
        if batch.places is None:
            raise ValueError("stored features need batches with places")
        return FeaturePart(batch, self.stored(batch.places))

    @torch.no_grad()
    def parts(self, batch: Batch | FeaturePart, count: int, clock: Clock) -> list[FeaturePart]:
        """Split a prepared batch into `count` parts, with the teachers' features for each: stored, or computed now."""
        if isinstance(batch, Batch):
            return [FeaturePart(part, self.targets(part)) for part in batch.split(count)]
        targets = zip(*(target.split(count) for target in batch.targets), strict=True)
        return [FeaturePart(part, list(each)) for part, each in zip(batch.batch.split(count), targets, strict=True)]

    def forward(self, part: FeaturePart) -> dict[str, Tensor]:
        """Return the losses of a part: `<distance>` for one teacher, or `<distance>_<number>` for each of several."""
        crops = part.batch.global_crops.flatten(0, 1)
        # The module is called whose weights are sharded as one.
        student: Tokens = self.student.backbone(resized(crops, self.size))
        losses = {}
        for i, (adaptor, target, grid) in enumerate(zip(self.adaptors, part.targets, self.grids, strict=True), 1):
            distances = self._distances(adaptor, student, target, grid)  # type: ignore[arg-type]
            for name, distance in distances.items():
                key = f"{name}_{i}" if len(self.adaptors) > 1 else name
                losses[key] = distance * self.loss.weights[name] / len(self.adaptors)
        return losses

    def _distances(
        self, adaptor: nn.ModuleDict, student: Tokens, target: Target, grid: tuple[int, int]
    ) -> dict[str, Tensor]:
        weights, distances = self.loss.weights, {}
        if "class" in adaptor:
            distances["class_cosine"] = cosine_distance(adaptor["class"](student.cls), target.cls.flatten(0, 1))
        if "patch" in adaptor:
            predicted = match_grid(adaptor["patch"](student.patches), student.grid, grid)
            patches = target.patches.flatten(0, 1)
            if "patch_cosine" in weights:
                distances["patch_cosine"] = cosine_distance(predicted, patches)
            if "patch_smooth_l1" in weights:
                distances["patch_smooth_l1"] = smooth_l1_distance(predicted, patches)
        return distances

    def metrics(
        self, parts: Sequence[FeaturePart], losses: Mapping[str, Tensor], clock: Clock
    ) -> dict[str, Tensor | float]:
        """Return metrics of training: the cosines between predictions and targets, and `momentum`.

        `features/class` and `features/patch` are means over the teachers: 1 if the student predicts their standardized
        features exactly, about 0 if it predicts the same for every image.
        """
        metrics: dict[str, Tensor | float] = {}
        for kind in ("class", "patch"):
            name = f"{kind}_cosine"
            terms = [value for key, value in losses.items() if key.startswith(name)]
            if terms:
                metrics[f"features/{kind}"] = 1 - torch.stack(terms).sum() / self.loss.weights[name]
        metrics["momentum"] = clock.value(self.momentum)
        return metrics

    def units(self) -> list[nn.Module]:
        """Return blocks before their backbone, for student and average; then the teachers and the adaptors."""
        units: list[nn.Module] = []
        for network in (self.student, self.average):
            units += [*network.blocks, network.backbone]
        for teacher in self.teachers:
            units += [*teacher.network.blocks, teacher]  # type: ignore[union-attr, misc]
        return [*units, *(module for adaptor in self.adaptors for module in adaptor.values())]  # type: ignore[operator]

    def param_groups(self) -> list[ParamGroup]:
        """Return the parameters of student and adaptors in groups of equal settings.

        Biases and one-dimensional parameters have no weight decay.
        """
        backbone, learning = self.student.backbone, self.learning

        def find_settings(name: str) -> tuple[str, float, int]:
            module, _, inside = name.partition(".")
            if module == "adaptors":
                return module, 1.0, 0
            return module, learning.rate(backbone, inside), learning.frozen_epochs

        trained = nn.ModuleDict({"backbone": backbone.model, "adaptors": self.adaptors})
        return group_parameters(trained.named_parameters(), find_settings)

    @torch.no_grad()
    def after_step(self, clock: Clock, done: Tensor) -> None:
        """Move the average towards the student, BatchNorm's statistics included."""
        self.average.move_towards(self.student, clock.value(self.momentum), done, buffers=True)


def _freeze_unused(backbone: Backbone, views: ViewsConfig) -> None:
    """Freeze parameters that no token depends on, such as layers of a CNN after its pooling.

    DDP waits for a gradient of every trained parameter. They are found on tensors without data.
    """
    size = views.global_1.size
    with torch.enable_grad(), torch.device("meta"):
        shadow = copy.deepcopy(backbone).to("meta").eval()
        tokens = shadow(torch.empty(1, views.channels, size, size))
        (tokens.cls.sum() + tokens.patches.sum()).backward()
    for own, seen in zip(backbone.parameters(), shadow.parameters(), strict=True):
        own.requires_grad_(own.requires_grad and seen.grad is not None)


def resized(views: Tensor, size: int) -> Tensor:
    """Resize square views: bicubic, antialiased. [B, C, H, H] to [B, C, size, size]"""
    if views.shape[-1] == size:
        return views
    return F.interpolate(views, (size, size), mode="bicubic", antialias=True)
