"""Losses, one per file; the tables of a preset select them."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from dinocli.core.config import Config
from dinocli.method.losses.dino import DinoLossConfig
from dinocli.method.losses.features import FeaturesLossConfig
from dinocli.method.losses.gram import GramLossConfig
from dinocli.method.losses.ibot import IbotLossConfig
from dinocli.method.losses.koleo import KoleoLossConfig
from dinocli.method.losses.labels import LabelsLossConfig
from dinocli.method.losses.sigreg import SigregLossConfig
from dinocli.method.losses.simdino import SimdinoLossConfig, SimdinoPatchesLossConfig
from dinocli.method.losses.targets import HeadLossConfig, PrototypeLossConfig

LossConfig = (
    HeadLossConfig | KoleoLossConfig | SigregLossConfig | GramLossConfig | FeaturesLossConfig | LabelsLossConfig
)


class LossesConfig(Config):
    """Losses of a run, one optional field each. A loss without a table in the preset is not computed.

    `features` and `labels` belong to other methods, feature distillation and classification. Each excludes all others.
    """

    dino: DinoLossConfig | None = None
    ibot: IbotLossConfig | None = None
    simdino: SimdinoLossConfig | None = None
    simdino_patches: SimdinoPatchesLossConfig | None = None
    koleo: KoleoLossConfig | None = None
    sigreg: SigregLossConfig | None = None
    gram: GramLossConfig | None = None
    features: FeaturesLossConfig | None = None
    labels: LabelsLossConfig | None = None

    def present(self) -> dict[str, LossConfig]:
        """Return the selected losses, by name."""
        return {name: getattr(self, name) for name in type(self).model_fields if getattr(self, name) is not None}

    def with_heads(self) -> dict[str, HeadLossConfig]:
        """Return the selected losses on the outputs of a head, by name."""
        return {name: loss for name, loss in self.present().items() if isinstance(loss, HeadLossConfig)}

    def with_targets(self) -> dict[str, PrototypeLossConfig]:
        """Return the selected losses on the prototypes of a head, which have targets, by name."""
        return {name: loss for name, loss in self.present().items() if isinstance(loss, PrototypeLossConfig)}

    def build(self, outputs: Callable[[str], int]) -> nn.ModuleDict:
        """Build the selected losses with their initial state.

        Args:
            outputs: Function from the name of a head to its number of outputs.
        """
        built: dict[str, nn.Module] = {name: c.build(outputs(c.head)) for name, c in self.with_heads().items()}
        for name, loss in (("koleo", self.koleo), ("sigreg", self.sigreg), ("gram", self.gram)):
            if loss is not None:
                built[name] = loss.build()
        return nn.ModuleDict(built)
