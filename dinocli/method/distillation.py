"""Self-distillation: the student predicts, for each crop, the teacher's output on the other crops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinocli.core.distributed import local, mean_over_processes
from dinocli.data.loader.batch import Batch
from dinocli.engine.method import Method, ParamGroup, group_parameters
from dinocli.engine.schedules import Clock, Schedule
from dinocli.method.losses import LossesConfig
from dinocli.method.losses.gram import Anchor, downsampled
from dinocli.method.losses.whole_batch import WholeBatchLoss
from dinocli.models.architecture import AS_THE_HEADS, LearningConfig
from dinocli.models.network import Encoding, Network


@dataclass(frozen=True)
class Part:
    """Part of a batch, with the targets for the student.

    Attributes:
        batch: Views of b images, and their masks.
        targets: Targets by the name of their loss: [G, b, K] for class tokens, [m, K] for patches.
        cls: The teacher's class tokens of the global views. [G, b, D]
        anchored: True if the student's patches are compared with the Gram teacher's.
        seed: Seed of the student's random draws, so that it can encode the part twice. If None, draws continue.
    """

    batch: Batch
    targets: dict[str, Tensor]
    cls: Tensor
    anchored: bool = False
    seed: int | None = None


class SelfDistillation(Method):
    """Self-distillation without labels, or distillation from a frozen, pretrained teacher.

    Args:
        student: Network that the gradient trains.
        average: Network of the same shape, which starts as a copy of the student and becomes its moving average.
        losses: Losses to minimize.
        momentum: Weight of the old average in each update; the student has the rest.
        learning: Learning rates of the backbone relative to the heads.
        frozen: Frozen teacher network. If None, the average is the teacher.
        gram: Network for the Gram teacher, with the average's backbone and no heads, if there is a Gram loss.

    Attributes:
        teacher: Network that computes the targets.
        gram: Gram teacher, a frozen copy of the average from an earlier step.

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
        gram: Network | None = None,
    ) -> None:
        super().__init__()
        self.learning = learning
        self.student = student
        average.requires_grad_(False).load_state_dict(student.state_dict())
        self.teacher = average if frozen is None else frozen.requires_grad_(False).eval()
        self.spare = None if frozen is None else average  # named as in the checkpoints of version 0.1
        self.momentum = momentum
        self.losses = losses.build(student.outputs)
        self.gram = None if gram is None else gram.requires_grad_(False).eval()
        self.anchoring = losses.gram
        self.visible = losses.ibot.visible if losses.ibot else 0.0

    @property
    def ema(self) -> Network | None:
        """Moving average of the student if the teacher is frozen; None if the average itself is the teacher."""
        return self.spare

    @property
    def average(self) -> Network:
        """Moving average of the student, the network that a run exports; by default it is also the teacher."""
        return self.teacher if self.ema is None else self.ema

    @property
    def networks(self) -> list[Network]:
        """Networks that a step runs."""
        return [self.student, self.teacher, *([self.gram] if self.gram else [])]

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.ema is not None:
            self.teacher.eval()  # so that its output for an image does not depend on the other images
        if self.gram is not None:
            self.gram.eval()
        return self

    def frozen_modules(self) -> list[str]:
        return [] if self.ema is None else ["teacher"]

    def form(self, clock: Clock) -> bool:
        """Return True if the Gram loss is active."""
        return self.anchoring is not None and self.anchoring.is_active(clock)

    @torch.no_grad()
    def before_step(self, clock: Clock) -> None:
        """Draw the directions of SIGReg, and copy the average to the Gram teacher if its schedule says so."""
        if "sigreg" in self.losses:
            self.losses["sigreg"].draw(clock, self.student.backbone.width, self.student.device)  # type: ignore[operator]
        if self.gram is None or self.anchoring is None or not self.anchoring.is_update(clock):
            return
        # Statistics of BatchNorm too. With FSDP both networks have the same shards.
        pairs = ((m.parameters(), m.buffers()) for m in (self.gram.backbone, self.average.backbone))
        own, current = (local([*parameters, *buffers]) for parameters, buffers in pairs)
        torch._foreach_copy_(own, current)

    @torch.no_grad()
    def prepare(self, batch: Batch) -> Batch:
        """Return a batch whose masks list the visible patches too, if a loss reads them."""
        if self.visible and batch.masks:
            return replace(batch, masks=batch.masks.with_visible(self.visible))
        return batch

    @torch.no_grad()
    def parts(self, batch: Batch, count: int, clock: Clock) -> list[Part]:
        """Split a prepared batch into `count` parts, with the teacher's targets for the batch as a whole.

        The teacher encodes only the global crops, one part at a time, like the student.
        """
        # Targets depend on the whole batch (Sinkhorn-Knopp, the center), so they come before the student's first part.
        batches = batch.split(count)
        # The teacher gets no mask: it sees every patch, and its heads read those that are masked for the student.
        outputs = [self.teacher([part.global_crops], rows=part.masks and part.masks.rows) for part in batches]
        joined = _join(outputs)
        targets: list[dict[str, Tensor]] = [{} for _ in batches]
        for name, loss in self.losses.items():
            all_targets: Tensor | None = loss.targets_for(joined, clock)  # type: ignore[operator]
            for i, share in enumerate(_split(all_targets, outputs) if all_targets is not None else ()):
                targets[i][name] = share
        parts = [Part(part, targets[i], outputs[i].cls, self.form(clock)) for i, part in enumerate(batches)]
        whole = {name: loss for name, loss in self.losses.items() if isinstance(loss, WholeBatchLoss)}
        return self._compute_means(parts, whole) if whole and count > 1 else parts

    def _compute_means(self, parts: list[Part], losses: Mapping[str, WholeBatchLoss]) -> list[Part]:
        """Give losses their means over a batch of several parts. Return the parts with the seeds that were used."""
        seeds = torch.randint(2**62, (len(parts),), device="cpu").tolist()
        parts = [replace(part, seed=seed) for part, seed in zip(parts, seeds, strict=True)]
        found: dict[str, list[Tensor]] = {name: [] for name in losses}
        for part in parts:
            student = self.encode(part)
            for name, loss in losses.items():
                found[name].append(loss.means(student, part.targets.get(name)))
        for name, loss in losses.items():
            loss.remember(found[name])
        return parts

    def forward(self, part: Part) -> dict[str, Tensor]:
        """Return the losses of a part, by name."""
        student = self.encode(part)
        losses = {name: loss(student, part.targets.get(name), part.batch.masks) for name, loss in self.losses.items()}
        return losses | ({"gram": self.compare_patches(part, student)} if part.anchored else {})

    def encode(self, part: Part) -> Encoding:
        """Return the student's output for a part."""
        if part.seed is not None:
            torch.manual_seed(part.seed)
        masks = part.batch.masks
        return self.student(part.batch.crops, masks and masks.where, masks and masks.rows, with_patches=part.anchored)

    def compare_patches(self, part: Part, student: Encoding) -> Tensor:
        """Return the Gram loss of a part. []"""
        loss: Tensor = self.losses["gram"](student, self._encode_anchor(part.batch, student.grid), part.batch.masks)
        return loss

    @torch.no_grad()
    def _encode_anchor(self, batch: Batch, grid: tuple[int, int]) -> Anchor:
        """Return the Gram teacher's tokens of the clean crops, with patches on the student's grid."""
        assert self.gram is not None
        if batch.clean_crops is None:
            raise ValueError("losses.gram needs the clean crops of a batch")
        # Nothing here depends on the other images, so it is computed for a part at a time, to save memory.
        anchor = self.gram([batch.clean_crops], with_patches=True)
        patches = downsampled(anchor.patches.flatten(0, 1), anchor.grid, grid)
        return Anchor(anchor.cls, patches.unflatten(0, anchor.patches.shape[:2]))

    def metrics(self, parts: Sequence[Part], losses: Mapping[str, Tensor], clock: Clock) -> dict[str, Tensor | float]:
        """Return metrics of training: those of each loss as `<loss>/<metric>`, `feature_std` and `momentum`.

        `feature_std` is the spread of the teacher's normalized class tokens over the images: 1 if they point evenly in
        all directions, 0 if they are all the same. It is omitted for a frozen teacher, whose features do not depend on
        the training.
        """
        metrics: dict[str, Tensor | float] = {}
        for name, loss in self.losses.items():
            shares = [part.targets[name] for part in parts if name in part.targets]
            targets = torch.cat(shares, _IMAGE_DIM[shares[0].ndim]) if shares else None
            of_loss = loss.metrics(targets, losses[name], clock)  # type: ignore[operator]
            metrics |= {f"{name}/{metric}": value for metric, value in of_loss.items()}
        if self.ema is None:
            cls = F.normalize(torch.cat([part.cls for part in parts], 1).float().flatten(0, 1), dim=-1)  # [G * B, D]
            variance = (cls - mean_over_processes(cls.mean(0))).square().sum(-1).mean()
            metrics["feature_std"] = mean_over_processes(variance).sqrt()
        metrics["momentum"] = clock.value(self.momentum)
        return metrics

    def units(self) -> list[nn.Module]:
        """Return the blocks of each network, then the network, so that student and average have the same shards."""
        networks = [*self.networks, *([self.ema] if self.ema else [])]
        return [module for network in networks for module in (*network.blocks, network)]

    def param_groups(self) -> list[ParamGroup]:
        """Return the student's trainable parameters in groups of equal settings.

        Biases and one-dimensional parameters have no weight decay. Prototypes are a separate group if they are frozen
        in the initial epochs. Class token and positions do have weight decay, as in the original and in DINOv2.
        """
        return group_parameters(self.student.named_parameters(), self._find_settings)

    def _find_settings(self, name: str) -> tuple[str, float, int]:
        """Return a parameter's module, the factor on its learning rate, and its number of frozen epochs."""
        if name.startswith("heads."):
            head, _, rest = name.removeprefix("heads.").partition(".")
            frozen = self.student.get_submodule(f"heads.{head}").freeze_last_layer_epochs
            return head, 1.0, int(frozen) if rest.startswith("last_layer.") else 0  # type: ignore[arg-type]
        inside = name.removeprefix("backbone.model.")
        return "backbone", self.learning.rate(self.student.backbone, inside), self.learning.frozen_epochs

    @torch.no_grad()
    def after_step(self, clock: Clock, done: Tensor) -> None:
        """Move the average towards the student, and update the state of the targets."""
        # Only parameters, as in the original: the average's BatchNorm keeps its own statistics.
        self.average.move_towards(self.student, clock.value(self.momentum), done)
        for loss in self.losses.values():
            loss.after_step()  # type: ignore[operator]


# Dimension along which parts are joined, by the targets' number of dimensions: class tokens [G, B, K], patches [M, K].
_IMAGE_DIM = {3: 1, 2: 0}


def _join(parts: Sequence[Encoding]) -> Encoding:
    cls = torch.cat([part.cls for part in parts], 1)
    class_logits = {head: torch.cat([part.class_logits[head] for part in parts], 1) for head in parts[0].class_logits}
    masked_logits = {head: torch.cat([part.masked_logits[head] for part in parts]) for head in parts[0].masked_logits}
    return Encoding(cls, parts[0].globals, class_logits, masked_logits)


def _split(targets: Tensor, parts: Sequence[Encoding]) -> Sequence[Tensor]:
    """Split a batch's targets into those of its parts."""
    if targets.ndim == 3:
        return targets.split([part.cls.shape[1] for part in parts], 1)
    return targets.split([len(next(iter(part.masked_logits.values()))) for part in parts])
