"""Frozen teacher: a pretrained network whose output a student learns to match."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dinocli.core.errors import DinoError
from dinocli.core.tensors import fingerprint
from dinocli.method.preset import Preset
from dinocli.models.architecture import BackboneConfig
from dinocli.models.head import HeadConfig
from dinocli.models.network import Network, load_strictly
from dinocli.weights.checkpoint import Weights, read_weights

_ITS_FEATURES = "--preset distill-features, which learns from its features"

# Largest number of a student's parameters relative to its teacher's: another patch size or registers add a few.
LARGER = 1.25


@dataclass(frozen=True)
class FrozenTeacher:
    """Checkpoint of this tool used as a frozen teacher; its size may differ from the student's.

    Attributes:
        source: Path of the checkpoint, as the user named it.
        preset: Preset that the teacher was trained with.
        fingerprint: Fingerprint of the weights of backbone and heads.

    Source: arXiv 2304.07193, section 5: DINOv2's small models were distilled from ViT-g/14 in this way.
    """

    source: str
    preset: Preset
    fingerprint: str

    @classmethod
    def read(cls, source: str) -> FrozenTeacher:
        """Read preset and fingerprint of a checkpoint without keeping its weights.

        Raises:
            DinoError: If the checkpoint does not exist, or another tool wrote it, so that its heads are unknown.
        """
        if source.startswith("timm:"):
            raise DinoError(f"{source} has no heads; this preset compares the outputs of heads", _ITS_FEATURES)
        try:
            weights = read_weights(Path(source))
        except DinoError as error:
            if error.hint.startswith("timm:"):
                raise DinoError(error.message, f"{_ITS_FEATURES}: --teacher {error.hint}") from error
            raise
        if weights.preset is None:
            raise DinoError(
                f"{source} was not written by this tool, so its heads are unknown; expected a teacher with heads",
                f"{_ITS_FEATURES}; or --teacher RUN of this tool",
            )
        if not weights.heads:
            raise DinoError(f"{source} has no heads; this preset compares the outputs of heads", _ITS_FEATURES)
        heads = {f"{name}.{key}": value for name, head in weights.heads.items() for key, value in head.items()}
        return cls(source, weights.preset, fingerprint(weights.backbone | heads))

    def describe(self, preset: Preset) -> str:
        """Return the source with the name of its backbone, for a table."""
        return f"{self.source} ({self.preset.backbone.name})"

    def network(self, student: Preset) -> Network:
        """Build the teacher's backbone and the heads that a student's losses read, with random weights.

        Args:
            student: Preset of the student.

        Raises:
            DinoError: If the teacher does not fit the student's preset.
        """
        self._check(student)
        backbone = self.preset.backbone.build(drop_path=False)
        refuse_smaller(self.source, backbone, student.backbone)
        heads = {name: self.preset.heads[name].build(backbone.width) for name in student.heads}
        network = Network(backbone, heads, student.reads)
        compared = [name for name, loss in student.losses.with_heads().items() if loss.reads == "patches"]
        if compared:
            name, side = compared[0], student.views.global_1.size
            own, theirs = student.backbone.build(drop_path=False).grid(side), backbone.grid(side)
            if own != theirs:
                raise DinoError(
                    f"losses.{name} compares individual patches; at {side} pixels the teacher has {_shape(theirs)} "
                    f"patches and the student {_shape(own)}",
                    f"use a student with patches of {backbone.patch_size} pixels, or --set losses.{name}=none",
                )
        return network

    def load(self, network: Network) -> None:
        """Load the teacher's weights into a network built by `network`.

        Raises:
            DinoError: If the checkpoint no longer exists, or has changed.
        """
        weights: Weights = read_weights(Path(self.source))
        load_strictly(network.backbone.model, weights.backbone, self.source)
        for name, head in network.heads.items():
            load_strictly(head, weights.heads[name], self.source)

    def _check(self, student: Preset) -> None:
        for name, head in student.heads.items():
            own = self.preset.heads.get(name)
            if own is None:
                raise DinoError(
                    f"the teacher {self.source} has no head {name}; its heads are {', '.join(self.preset.heads)}",
                    f"rename the student's head to the teacher's: [heads.{next(iter(self.preset.heads))}]",
                )
            if (own.prototypes, own.outputs) != (head.prototypes, head.outputs):
                raise DinoError(
                    f"the teacher's head {name} has {_describe(own)}; the student's has {_describe(head)}",
                    f"--set heads.{name}.prototypes={own.prototypes}"
                    if own.prototypes
                    else f"--set heads.{name}.prototypes=none --set heads.{name}.bottleneck={own.bottleneck}",
                )
        taught = {(loss.head, loss.reads) for loss in self.preset.losses.with_heads().values()}
        for name, wanted in student.losses.with_heads().items():
            if (wanted.head, wanted.reads) not in taught:
                raise DinoError(
                    f"losses.{name} applies the teacher's head {wanted.head} to {_READS[wanted.reads]}, on which it "
                    "was not trained",
                    f"use a teacher trained with losses.{name}, or --set losses.{name}=none",
                )
        for key in ("mean", "std"):
            own_numbers, numbers = list(getattr(self.preset.views, key)), list(getattr(student.views, key))
            if own_numbers != numbers:
                raise DinoError(
                    f"views.{key}={numbers} differs from the teacher's {own_numbers}; both networks receive the same "
                    "images",
                    f"--set views.{key}='{own_numbers}'",
                )


def _describe(head: HeadConfig) -> str:
    return f"{head.prototypes} prototypes" if head.prototypes else f"features of width {head.bottleneck}"


def refuse_smaller(source: str, teacher: nn.Module, student: BackboneConfig) -> None:
    """Check that a teacher is about as large as its student.

    Raises:
        DinoError: If the student has many more parameters.
    """
    with torch.device("meta"):
        own = sum(parameter.numel() for parameter in student.build(drop_path=False).parameters())
    theirs = sum(parameter.numel() for parameter in teacher.parameters())
    if theirs * LARGER < own:
        raise DinoError(
            f"the teacher {source} has {theirs / 1e6:.2f} M parameters, the student {own / 1e6:.2f} M; a student "
            "learns little from a smaller network",
            f"use a larger --teacher, or --set backbone.name=NAME with at most {theirs * LARGER / 1e6:.2f} M",
        )


_READS = {"class": "class tokens", "patches": "patches"}


def _shape(grid: tuple[int, int] | None) -> str:
    return "none" if grid is None else f"{grid[0]}x{grid[1]}"
