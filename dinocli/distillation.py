"""SelfDistillation: the method. A student learns to say of each crop what its own moving average says of others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinocli.data.loader import Batch
from dinocli.distributed import local, mean_over_processes
from dinocli.engine.method import Method, ParamGroup
from dinocli.losses import LossesConfig
from dinocli.models.architecture import AS_THE_HEADS, LearningConfig
from dinocli.models.network import Encoding, Network
from dinocli.schedules import Clock, Schedule


@dataclass(frozen=True)
class Part:
    """Images of a batch, and what the student is to say of them.

    Attributes:
        batch: The views of b images.
        targets: For each loss that has targets, by its name: of class tokens [G, b, K], of hidden patches [m, K].
        cls: The teacher's class tokens of the global views. [G, b, D]
    """

    batch: Batch
    targets: dict[str, Tensor]
    cls: Tensor


class SelfDistillation(Method):
    """Self-distillation with no labels; or distillation from a teacher that was trained before.

    Args:
        student: What the gradient moves.
        average: Of the same shape; it starts as a copy of the student and follows it as a moving average.
        losses: Which losses there are.
        momentum: How much of itself the average keeps at a step.
        learning: How the backbone learns, where not like the heads.
        frozen: A teacher that stays as it is; absent, the average is the teacher.

    Attributes:
        teacher: What sets the targets.

    Source: arXiv 2104.14294, algorithm 1.
    """

    def __init__(
        self,
        student: Network,
        average: Network,
        losses: LossesConfig,
        momentum: Schedule,
        learning: LearningConfig = AS_THE_HEADS,
        frozen: Network | None = None,
    ) -> None:
        super().__init__()
        self.learning = learning
        self.student = student
        average.requires_grad_(False).load_state_dict(student.state_dict())
        self.teacher = average if frozen is None else frozen.requires_grad_(False).eval()
        self.spare = None if frozen is None else average
        self.momentum = momentum
        self.losses = losses.build(student.prototypes)

    @property
    def average(self) -> Network:
        """The student's moving average, which is what a run hands on: the teacher itself, unless that is frozen."""
        return self.teacher if self.spare is None else self.spare

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.spare is not None:
            self.teacher.eval()  # what it says of an image hangs on no other image
        return self

    def lasting(self) -> list[str]:
        return [] if self.spare is None else ["teacher"]

    @torch.no_grad()
    def parts(self, batch: Batch, count: int, clock: Clock) -> list[Part]:
        """A batch in `count` parts, with the targets that its teacher sets for it as a whole.

        The teacher sees the global crops alone, and as many images at a time as the student will.
        """
        batches = batch.split(count)
        seen = [self.teacher([part.global_crops], rows=part.masks and part.masks.rows) for part in batches]
        whole = _joined(seen)
        targets: list[dict[str, Tensor]] = [{} for _ in batches]
        for name, loss in self.losses.items():
            aimed: Tensor | None = loss.aim(whole, clock)  # type: ignore[operator]
            for i, share in enumerate(_parted(aimed, seen) if aimed is not None else ()):
                targets[i][name] = share
        return [Part(part, targets[i], seen[i].cls) for i, part in enumerate(batches)]

    def forward(self, part: Part) -> dict[str, Tensor]:
        """The losses of a part."""
        masks = part.batch.masks
        student = self.student(part.batch.crops, masks and masks.where, masks and masks.rows)
        return {name: loss(student, part.targets.get(name), masks) for name, loss in self.losses.items()}

    def watch(self, parts: Sequence[Part], losses: Mapping[str, Tensor], clock: Clock) -> dict[str, Tensor | float]:
        """What tells whether the networks learn: of each loss as `<loss>/<figure>`, and of the features.

        `feature_std` is the spread of the teacher's normalized class tokens over the images: 1 where they lie in all
        directions alike, 0 where they are all the same. Those of a frozen teacher tell nothing.
        """
        figures: dict[str, Tensor | float] = {}
        for name, loss in self.losses.items():
            shares = [part.targets[name] for part in parts if name in part.targets]
            targets = torch.cat(shares, _IMAGES[shares[0].ndim]) if shares else None
            told = loss.watch(targets, losses[name], clock)  # type: ignore[operator]
            figures |= {f"{name}/{figure}": value for figure, value in told.items()}
        if self.spare is None:
            cls = F.normalize(torch.cat([part.cls for part in parts], 1).float().flatten(0, 1), dim=-1)  # [G * B, D]
            away = (cls - mean_over_processes(cls.mean(0))).square().sum(-1).mean()
            figures["feature_std"] = mean_over_processes(away).sqrt()
        figures["momentum"] = self.momentum.at(clock)
        return figures

    def units(self) -> list[nn.Module]:
        """The blocks of all networks, and the networks: so that shards of average and student lie side by side."""
        networks = [network for network in (self.student, self.teacher, self.spare) if network is not None]
        return [module for network in networks for module in (*network.blocks(), network)]

    def param_groups(self) -> list[ParamGroup]:
        """The student's parameters: no decay on biases and one-dimensional ones, prototypes apart while frozen.

        Class token and positions do get decay, as in the original and in DINOv2.
        """
        groups: dict[tuple[bool, float, int], ParamGroup] = {}
        for name, parameter in self.student.named_parameters():
            if not parameter.requires_grad:
                continue
            decay = parameter.ndim > 1 and not name.endswith(".bias")
            module, rate, frozen = self._learns(name)
            group = groups.setdefault((decay, rate, frozen), ParamGroup([], decay, rate, frozen))
            group.params.append(parameter)
            group.modules.append(module)
        return list(groups.values())

    def _learns(self, name: str) -> tuple[str, float, int]:
        """The module of a student's parameter, the factor on its rate, and the epochs in which it is frozen."""
        if name.startswith("heads."):
            head, _, rest = name.removeprefix("heads.").partition(".")
            frozen = self.student.get_submodule(f"heads.{head}").freeze_last_layer_epochs
            return head, 1.0, int(frozen) if rest.startswith("last_layer.") else 0  # type: ignore[arg-type]
        inside = name.removeprefix("backbone.model.")
        backbone, learning = self.student.backbone, self.learning
        rate = learning.layer_decay ** (len(backbone.row) + 1 - backbone.level(inside)) if backbone.row else 1.0
        rate *= learning.patch_embed if inside.startswith("patch_embed.") else 1.0
        return "backbone", rate, learning.frozen_epochs

    @torch.no_grad()
    def after_step(self, clock: Clock, done: Tensor) -> None:
        """Move the average towards the student, and let the targets take in what the step saw."""
        # Parameters alone, as in the original: the average's BatchNorm keeps statistics of its own.
        average = local(list(self.average.parameters()))
        student = local(list(self.student.parameters()))
        pull = (1 - self.momentum.at(clock)) * done.to(average[0].dtype)
        torch._foreach_lerp_(average, student, [pull] * len(average))
        for loss in self.losses.values():
            loss.after_step()  # type: ignore[operator]


# Along which dimension images lie, of what is said of class tokens [V, B, K] and of patches [M, K].
_IMAGES = {3: 1, 2: 0}


def _joined(parts: Sequence[Encoding]) -> Encoding:
    """What a network made of a batch, from what it made of its parts."""
    cls = torch.cat([part.cls for part in parts], 1)
    logits = {head: torch.cat([part.logits[head] for part in parts], 1) for head in parts[0].logits}
    hidden = {head: torch.cat([part.hidden[head] for part in parts]) for head in parts[0].hidden}
    return Encoding(cls, parts[0].globals, logits, hidden)


def _parted(targets: Tensor, parts: Sequence[Encoding]) -> Sequence[Tensor]:
    """The targets of each part, of those of the batch."""
    if targets.ndim == 3:
        return targets.split([part.cls.shape[1] for part in parts], 1)
    return targets.split([len(next(iter(part.hidden.values()))) for part in parts])
