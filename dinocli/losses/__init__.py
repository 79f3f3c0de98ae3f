"""Losses: one a file. Which of them a run has is which tables its preset holds."""

from __future__ import annotations

from dinocli.config import Config
from dinocli.losses.dino import DinoLossConfig


class LossesConfig(Config):
    """One optional field a loss; a loss whose table is absent does not exist."""

    dino: DinoLossConfig | None = None

    def present(self) -> dict[str, DinoLossConfig]:
        """The losses that exist, by name."""
        return {name: getattr(self, name) for name in type(self).model_fields if getattr(self, name) is not None}
