"""Losses: one a file. Which of them a run has is which tables its preset holds."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from dinocli.config import Config
from dinocli.losses.dino import DinoLossConfig
from dinocli.losses.ibot import IbotLossConfig
from dinocli.losses.koleo import KoleoLossConfig

LossConfig = DinoLossConfig | IbotLossConfig | KoleoLossConfig
AimedConfig = DinoLossConfig | IbotLossConfig


class LossesConfig(Config):
    """One optional field a loss; a loss whose table is absent does not exist."""

    dino: DinoLossConfig | None = None
    ibot: IbotLossConfig | None = None
    koleo: KoleoLossConfig | None = None

    def present(self) -> dict[str, LossConfig]:
        """The losses that exist, by name."""
        return {name: getattr(self, name) for name in type(self).model_fields if getattr(self, name) is not None}

    def aimed(self) -> dict[str, AimedConfig]:
        """Those of them that read a head and have targets, by name."""
        return {name: loss for name, loss in self.present().items() if not isinstance(loss, KoleoLossConfig)}

    def build(self, prototypes: Callable[[str], int]) -> nn.ModuleDict:
        """The losses that exist, at the start.

        Args:
            prototypes: Of a head, by its name.
        """
        built: dict[str, nn.Module] = {name: c.build(prototypes(c.head)) for name, c in self.aimed().items()}
        if self.koleo is not None:
            built["koleo"] = self.koleo.build()
        return nn.ModuleDict(built)
