"""Feature teachers: frozen encoders of any source whose features a student learns to predict."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from dinocli.core.errors import DinoError
from dinocli.data.views.crops import ViewsConfig
from dinocli.features.encoder import Encoder
from dinocli.method.feature_distillation import FeatureDistillation, Teacher
from dinocli.method.losses.features import FeaturesLossConfig
from dinocli.method.preset import Preset
from dinocli.models.backbone import Backbone
from dinocli.weights.frozen_teacher import refuse_smaller
from dinocli.weights.load import announcement, load_encoder


@dataclass(frozen=True)
class FeatureTeachers:
    """Encoders that teach together, on the CPU.

    Attributes:
        encoders: Encoders in the order of `--teacher`.
    """

    encoders: tuple[Encoder, ...]

    @classmethod
    def read(cls, sources: Sequence[str], note: Callable[[str], None] = lambda line: None) -> FeatureTeachers:
        """Load the encoders of some sources.

        Args:
            sources: Sources as `load_encoder` reads them.
            note: Callback that receives a line before a download, and the assumptions about a file.

        Raises:
            DinoError: If a source does not exist or cannot be read, or comes twice.
        """
        encoders: list[Encoder] = []
        for source in sources:
            if line := announcement(source):
                note(line)
            encoder = load_encoder(source, torch.device("cpu"))
            for line in encoder.notes:
                note(f"note: {line}")
            same = next((other for other in encoders if other.fingerprint == encoder.fingerprint), None)
            if same:
                raise DinoError(f"--teacher {source} has the weights of --teacher {same.source}", "name it once")
            encoders.append(encoder)
        return cls(tuple(encoders))

    @property
    def source(self) -> str:
        """Sources as the user named them."""
        return ", ".join(encoder.source for encoder in self.encoders)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the weights of one encoder, or of all in their order."""
        each = [encoder.fingerprint for encoder in self.encoders]
        return each[0] if len(each) == 1 else hashlib.sha256(" ".join(each).encode()).hexdigest()[:16]

    def describe(self, preset: Preset) -> str:
        """Return the sources with the sizes of networks and views, for a table."""
        pairs = zip(self.encoders, self.sizes(preset), strict=True)
        return ", ".join(f"{e.source} ({_count(e.backbone) / 1e6:.1f} M parameters, views of {s})" for e, s in pairs)

    def sizes(self, preset: Preset) -> list[int]:
        """Return the side of the views that each teacher sees.

        Raises:
            DinoError: If `losses.features.teacher_size` does not fit the teachers.
        """
        loss, count, size = _loss(preset), len(self.encoders), preset.views.global_1.size
        patches = [e.backbone.patch_size if e.backbone.grid(size) else 1 for e in self.encoders]
        if loss.teacher_size is None:
            return [-(-size // patch) * patch for patch in patches]
        given = loss.teacher_size if isinstance(loss.teacher_size, list) else [loss.teacher_size] * count
        if len(given) != count:
            raise DinoError(
                f"losses.features.teacher_size has {len(given)} values for {count} teacher{'s' * (count > 1)}",
                f"--set losses.features.teacher_size='{given[0] if given else size}'",
            )
        valid = [max(1, round(side / patch)) * patch for side, patch in zip(given, patches, strict=True)]
        if valid != given or not all(8 <= side <= 4096 for side in given):
            text = str(valid[0] if count == 1 else valid)
            raise DinoError(
                f"losses.features.teacher_size is {loss.teacher_size}; expected multiples of the teachers' patches, "
                f"{', '.join(map(str, patches))}, from 8 to 4096",
                f"--set losses.features.teacher_size='{text}'",
            )
        return given

    def views(self, preset: Preset) -> ViewsConfig:
        """Return the views to cut from an image: at the largest size that student or teachers see."""
        largest = max(preset.views.global_1.size, *self.sizes(preset))
        sizes = {"global_1": preset.views.global_1, "global_2": preset.views.global_2}
        larger = {name: view.model_copy(update={"size": largest}) for name, view in sizes.items() if view}
        return preset.views.model_copy(update=larger)

    def method(self, preset: Preset) -> FeatureDistillation:
        """Build the method with fresh weights, and copies of the teachers on torch's default device.

        Raises:
            DinoError: If a teacher does not fit the preset.
        """
        self._check_channels(preset)
        device = torch.get_default_device()  # an estimate of costs runs on the meta device
        teachers = []
        for encoder, size in zip(self.encoders, self.sizes(preset), strict=True):
            backbone = copy.deepcopy(encoder.backbone).to(device)
            teachers.append(Teacher(backbone, encoder.mean, encoder.std, size, _grid(backbone, encoder, size)))
        method = preset.feature_method(teachers)
        # A small specialist may teach beside a large network.
        largest = max(self.encoders, key=lambda encoder: _count(encoder.backbone))
        refuse_smaller(largest.source, largest.backbone, preset.backbone)
        return method

    def _check_channels(self, preset: Preset) -> None:
        for encoder in self.encoders:
            if encoder.channels != preset.images.channels:
                counted = f"{encoder.channels} channel{'s' * (encoder.channels > 1)}"
                raise DinoError(
                    f"the teacher {encoder.source} takes {counted}; images.channels is {preset.images.channels}",
                    f"use a teacher with {preset.images.channels}, or --set images.channels={encoder.channels}"
                    + ("" if encoder.channels == 3 else " with views.mean and views.std of as many values"),
                )


def _loss(preset: Preset) -> FeaturesLossConfig:
    if preset.losses.features is None:
        raise DinoError("the preset has no losses.features for teachers without heads", "--preset distill-features")
    return preset.losses.features


@torch.no_grad()
def _grid(backbone: Backbone, encoder: Encoder, size: int) -> tuple[int, int]:
    """Return rows and columns of a teacher's patches, from one blank view.

    Raises:
        DinoError: If the teacher does not take views of this size, or gives no patches.
    """
    tokens = backbone(torch.zeros(1, encoder.channels, size, size))
    if tokens.patches.shape[1] != tokens.grid[0] * tokens.grid[1] or not tokens.patches.shape[1]:
        raise DinoError(f"the teacher {encoder.source} has no map of patches", "use a ViT or a convolutional network")
    return tokens.grid


def _count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
