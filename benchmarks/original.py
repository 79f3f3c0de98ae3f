"""Reimplementation of the original's training step, as the reference for dinocli's step.

As in the original, the backbone runs once per resolution and computes the last block for all tokens, with plain
attention. Each pair of views has its own log-softmax, clipping and moving average go parameter by parameter, and the
host reads the loss twice per step. Weights and settings come from a preset, so that both steps compute the same. Loss
scaling, which the original's float16 needs, is omitted: autocast uses bfloat16 here.

Source: facebookresearch/dino@7c446df main_dino.py, vision_transformer.py, utils.py.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dinocli.core.errors import DinoError
from dinocli.data.loader.batch import Batch
from dinocli.engine.optim import AdamWConfig
from dinocli.engine.schedules import Clock
from dinocli.method.preset import Preset
from dinocli.models.architecture import create_timm
from dinocli.models.head import HeadConfig


class OriginalNetwork(nn.Module):
    """Vision transformer and head with a network's weights."""

    def __init__(self, preset: Preset, weights: Mapping[str, Tensor], *, student: bool) -> None:
        super().__init__()
        options: dict[str, Any] = dict(preset.backbone.options)
        self.backbone = create_timm(
            preset.backbone.name, **options, drop_path_rate=preset.backbone.drop_path if student else 0.0
        )
        if not isinstance(self.backbone, VisionTransformer) or not isinstance(preset.optimizer, AdamWConfig):
            raise DinoError(
                f"the original's step supports vision transformers with AdamW; got a "
                f"{type(self.backbone).__name__} with {preset.optimizer.kind}",
                "use --ways float32 bfloat16",
            )
        for block in self.backbone.blocks:
            block.attn.fused_attn = False
        name = preset.losses.present()["dino"].head
        head = preset.heads[name]
        self.mlp = _mlp(head, self.backbone.embed_dim)
        with warnings.catch_warnings(action="ignore"):  # torch deprecates this weight norm
            last = nn.Linear(head.bottleneck, head.prototypes, bias=False)
            self.last_layer = nn.utils.weight_norm(last)
        self.last_layer.weight_g.requires_grad = not (student and head.norm_last_layer)
        for key, module in (("backbone", self.backbone), (f"heads.{name}", self)):
            own = {k.removeprefix(f"{key}."): v for k, v in weights.items() if k.startswith(f"{key}.")}
            kept = module.load_state_dict(own, strict=module is self.backbone)
            assert not kept.unexpected_keys
            assert all(k.startswith("backbone.") for k in kept.missing_keys)

    def forward(self, crops: Sequence[Tensor]) -> Tensor:  # V of [B, 3, H, W] -> [V * B, K]
        """Return logits view after view, each with all images of the batch."""
        groups = [list(group) for _, group in itertools.groupby(crops, key=lambda crop: crop.shape[-1])]
        features = torch.cat([self.features(torch.cat(group)) for group in groups])
        return self.logits(features)

    def logits(self, features: Tensor) -> Tensor:  # [S, D] -> [S, K]
        return self.last_layer(F.normalize(self.mlp(features), dim=-1))

    def features(self, images: Tensor) -> Tensor:  # [S, 3, H, W] -> [S, D]
        patches = self.backbone.patch_embed.proj(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.backbone.cls_token.expand(len(patches), -1, -1), patches], 1)
        x = x + self._positions(images.shape[2], images.shape[3])
        for block in self.backbone.blocks:
            x = block(x)
        return self.backbone.norm(x)[:, 0]

    def _positions(self, height: int, width: int) -> Tensor:
        table, patch = self.backbone.pos_embed, self.backbone.patch_embed.patch_size[0]
        rows, columns, side = height // patch, width // patch, math.isqrt(table.shape[1] - 1)
        if rows * columns == side * side and height == width:
            return table
        grid = table[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, scale_factor=((rows + 0.1) / side, (columns + 0.1) / side), mode="bicubic")
        return torch.cat([table[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], 1)


def _mlp(head: HeadConfig, width: int) -> nn.Module:
    widths = [width, *[head.hidden] * (head.layers - 1), head.bottleneck]
    layers: list[nn.Module] = [nn.Linear(widths[0], widths[1])]
    for i in range(1, head.layers):
        norm = [nn.BatchNorm1d(head.hidden)] if head.batch_norm else []
        layers += [*norm, nn.GELU(), nn.Linear(widths[i], widths[i + 1])]
    return nn.Sequential(*layers) if head.layers > 1 else layers[0]


class OriginalLoss(nn.Module):
    """Cross-entropy over all pairs of a teacher's view and a different student's view; it also updates the center."""

    center: Tensor

    def __init__(self, prototypes: int, views: int, student_temperature: float, center_momentum: float) -> None:
        super().__init__()
        self.views, self.student_temperature, self.center_momentum = views, student_temperature, center_momentum
        self.register_buffer("center", torch.zeros(1, prototypes))

    def forward(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        predictions = (student / self.student_temperature).chunk(self.views)
        targets = F.softmax((teacher - self.center) / temperature, dim=-1).detach().chunk(2)
        total, terms = 0, 0
        for i, q in enumerate(targets):
            for v, logits in enumerate(predictions):
                if v != i:
                    total = total + torch.sum(-q * F.log_softmax(logits, dim=-1), dim=-1).mean()
                    terms += 1
        self._move_center(teacher)
        return total / terms

    @torch.no_grad()
    def _move_center(self, teacher: Tensor) -> None:
        mean = torch.sum(teacher, dim=0, keepdim=True) / len(teacher)
        self.center = self.center * self.center_momentum + mean * (1 - self.center_momentum)


class OriginalStep:
    """The original's training step with a preset's settings.

    Args:
        preset: Preset with two global views, as in the original.
        weights: Initial weights of student and teacher, with the names of `Network.weights`.
        clock: Initial position in the schedules.
        device: Training device.
        precision: Autocast context for networks and loss.
    """

    def __init__(
        self,
        preset: Preset,
        weights: Mapping[str, Tensor],
        clock: Clock,
        device: torch.device,
        precision: contextlib.AbstractContextManager[Any],
    ) -> None:
        self.preset, self.clock, self.precision = preset, clock, precision
        self.config = preset.losses.present()["dino"]
        self.lr = preset.optimizer.lr_for(preset.training.batch_size)
        self.student = OriginalNetwork(preset, weights, student=True).to(device)
        self.teacher = OriginalNetwork(preset, weights, student=False).to(device).requires_grad_(False)
        head = preset.heads[self.config.head]
        self.frozen_epochs = head.freeze_last_layer_epochs
        self.loss = OriginalLoss(
            head.prototypes, len(preset.views.all), self.config.student_temperature, self.config.targets.momentum
        ).to(device)
        moved = {name: p for name, p in self.student.named_parameters() if p.requires_grad}
        plain = [p for name, p in moved.items() if name.endswith(".bias") or p.ndim == 1]
        decayed = [p for name, p in moved.items() if not name.endswith(".bias") and p.ndim != 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed}, {"params": plain, "weight_decay": 0.0}],
            betas=preset.optimizer.betas,
            eps=preset.optimizer.eps,
            foreach=False,
        )

    def step(self, batch: Batch) -> float:
        """Do one step, and return its loss."""
        for i, group in enumerate(self.optimizer.param_groups):
            group["lr"] = self.lr.at(self.clock)
            if i == 0:
                group["weight_decay"] = self.preset.optimizer.weight_decay.at(self.clock)
        crops = [crop for group in batch.crops for crop in group]
        with self.precision:
            teacher = self.teacher(crops[:2])
            student = self.student(crops)
            loss = self.loss(student, teacher, self.config.targets.temperature.at(self.clock))
        if not math.isfinite(loss.item()):  # the first synchronization with the device
            raise DinoError(f"the loss is {loss.item()}, at which the original stops", "use another --batch-size")
        self.optimizer.zero_grad()
        loss.backward()
        self._clip()
        if self.clock.epoch < self.frozen_epochs:
            for name, p in self.student.named_parameters():
                if "last_layer" in name:
                    p.grad = None
        self.optimizer.step()
        self.move_teacher()
        self.clock = self.clock.tick()
        if loss.is_cuda:
            torch.cuda.synchronize()
        return loss.item()

    def _clip(self) -> None:
        if self.preset.optimizer.clip is None:
            return
        for p in self.student.parameters():
            if p.grad is not None:
                share = self.preset.optimizer.clip.norm / (
                    p.grad.norm(2).item() + 1e-6
                )  # one synchronization per parameter
                if share < 1:
                    p.grad.mul_(share)

    @torch.no_grad()
    def move_teacher(self) -> None:
        """Move the teacher towards the student."""
        m = self.preset.teacher.momentum.at(self.clock)
        for student, teacher in zip(self.student.parameters(), self.teacher.parameters(), strict=True):
            teacher.mul_(m).add_((1 - m) * student.detach())
