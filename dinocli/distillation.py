"""SelfDistillation: the method. A student learns to say of each crop what its own moving average says of others."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dinocli.data.loader import Batch
from dinocli.engine.method import Method, ParamGroup
from dinocli.losses import LossesConfig
from dinocli.models.network import Network
from dinocli.schedules import Clock, Schedule


class SelfDistillation(Method):
    """Self-distillation with no labels.

    Args:
        student: What the gradient moves.
        teacher: Of the same shape; it starts as a copy of the student and follows it as a moving average.
        losses: Which losses there are.
        momentum: How much of itself the teacher keeps at a step.

    Source: arXiv 2104.14294, algorithm 1.
    """

    def __init__(self, student: Network, teacher: Network, losses: LossesConfig, momentum: Schedule) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher.requires_grad_(False)
        self.teacher.load_state_dict(student.state_dict())
        self.momentum = momentum
        self.head_of = {name: config.head for name, config in losses.present().items()}
        self.losses = nn.ModuleDict(
            {name: config.build(student.prototypes(config.head)) for name, config in losses.present().items()}
        )

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """The losses of a batch; the teacher sees the global crops alone."""
        with torch.no_grad():
            teacher = self.teacher([batch.global_crops])
        student = self.student(batch.crops)
        return {
            name: loss(student.logits[head], teacher.logits[head], clock)
            for (name, loss), head in zip(self.losses.items(), self.head_of.values(), strict=True)
        }

    def param_groups(self) -> list[ParamGroup]:
        """The student's parameters: no decay on biases and one-dimensional ones, prototypes apart while frozen.

        Class token and positions do get decay, as in the original.
        """
        groups: dict[tuple[bool, int], list[nn.Parameter]] = {}
        for decay, frozen_epochs, parameter in self._student_parameters():
            groups.setdefault((decay, frozen_epochs), []).append(parameter)
        return [ParamGroup(params, decay=d, frozen_epochs=f) for (d, f), params in groups.items()]

    def _student_parameters(self) -> Iterator[tuple[bool, int, nn.Parameter]]:
        for name, parameter in self.student.named_parameters():
            if parameter.requires_grad:
                owner = name.partition(".last_layer.")[0]
                head = self.student.get_submodule(owner) if owner != name else None
                frozen = int(head.freeze_last_layer_epochs) if head is not None else 0  # type: ignore[arg-type]
                yield parameter.ndim > 1 and not name.endswith(".bias"), frozen, parameter

    @torch.no_grad()
    def after_step(self, clock: Clock) -> None:
        """Move the teacher towards the student, and let the targets take in what the step saw."""
        # Parameters alone, as in the original: the teacher's BatchNorm keeps statistics of its own.
        pull = 1 - self.momentum.at(clock)
        torch._foreach_lerp_(list(self.teacher.parameters()), list(self.student.parameters()), pull)
        for loss in self.losses.values():
            loss.after_step()  # type: ignore[operator]
