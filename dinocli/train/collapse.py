"""Collapse detection: recognizes from logged figures that self-distillation has stopped learning."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from dinocli.engine.schedules import Constant
from dinocli.method.losses.targets import CenteringConfig, PrototypeLossConfig
from dinocli.method.preset import Preset

# Thresholds of entropy and information, in shares of ln K. Runs of `tiny` that were made to collapse reached 0.986 and
# 0.013, or 0.005 and 0.013; runs that learned had 0.1 to 0.5 and 0.18 to 0.38 (docs/results.md).
_UNIFORM, _ONE_SIDED, _NOTHING = 0.975, 0.02, 0.02
_STEPS = (50, 300)  # shortest and longest span; a fresh network gives all images similar outputs for some hundred steps

Kind = Literal["uniform", "one-sided", "constant"]


@dataclass(frozen=True)
class Collapse:
    """Collapse of a loss.

    Attributes:
        kind: `uniform` if every prototype gets the same, `one-sided` if one gets everything, `constant` if a student of
            features predicts the same for every image.
        words: Description in one line.
        remedy: Suggested change, with the options to type.
    """

    kind: Kind
    words: str
    remedy: str


class CollapseDetector:
    """Detector of targets that no longer carry information about the images. It reports each collapse once.

    Source: arXiv 2104.14294, section 5.3: without sharpening the targets' entropy rises to ln K, without centering it
    falls to 0. In both cases the student has nothing left to learn.
    """

    def __init__(self, preset: Preset, steps: int) -> None:
        self.preset = preset
        self.span = max(_STEPS[0], min(_STEPS[1], steps // 4))
        self._lines: deque[tuple[int, Mapping[str, float]]] = deque()
        self._told: set[str] = set()

    def update(self, step: int, figures: Mapping[str, float]) -> Collapse | None:
        """Add a logged step, and return a collapse that was not reported yet.

        Args:
            step: Number of steps done.
            figures: Logged figures, including those of `SelfDistillation.metrics`.
        """
        self._lines.append((step, figures))
        if step - self._lines[0][0] < self.span:
            return None
        while step - self._lines[1][0] >= self.span:
            self._lines.popleft()
        for name, loss in self.preset.losses.with_targets().items():
            kind = self._kind(name, math.log(self.preset.heads[loss.head].prototypes))
            if kind is None:
                self._told.discard(name)
            elif name not in self._told:
                self._told.add(name)
                return Collapse(kind, self._words(name, loss, kind), _remedy(self.preset, name, loss, kind))
        return self._check_features() if self.preset.losses.features else None

    def _check_features(self) -> Collapse | None:
        """Return a collapse of feature distillation: predictions that do not correlate with the teachers' features."""
        cosines = [
            sum(figures.get(f"features/{kind}", 0.0) for _, figures in self._lines) / len(self._lines)
            for kind in ("class", "patch")
        ]
        if max(cosines) > _NOTHING:
            self._told.discard("features")
        elif "features" not in self._told:
            self._told.add("features")
            rate = self.preset.optimizer.lr
            key, value = ("value", rate.value) if isinstance(rate, Constant) else ("start", rate.start)
            return Collapse(
                "constant",
                f"constant collapse: for {self.span} steps the student predicts the same features for any image "
                "(losses.features)",
                f"start again with --out NEW and a lower rate: --set optimizer.lr.{key}={value / 3:.2g}",
            )
        return None

    def _kind(self, loss: str, most: float) -> Kind | None:
        """Return the kind of a loss's collapse, from the means of its figures over the span in shares of ln K."""
        entropy, information = (
            sum(figures.get(f"{loss}/{figure}", math.nan) for _, figures in self._lines) / len(self._lines) / most
            for figure in ("teacher_entropy", "information")
        )
        if not information < _NOTHING:  # also if it is nan
            return None
        return "uniform" if entropy > _UNIFORM else "one-sided" if entropy < _ONE_SIDED else None

    def _words(self, name: str, loss: PrototypeLossConfig, kind: Kind) -> str:
        said = {
            "uniform": "gives every prototype the same share",
            "one-sided": "gives nearly everything to one prototype",
        }[kind]
        seen = "image" if loss.reads == "class" else "patch"
        return f"{kind} collapse: for {self.span} steps the teacher {said}, for any {seen} (losses.{name})"


def _remedy(preset: Preset, name: str, loss: PrototypeLossConfig, kind: Kind) -> str:
    """Return the first remedy from users' reports or the paper that this preset does not have yet."""
    rule = f"losses.{name}.targets"
    temperature, batch = max(loss.targets.temperature.bounds), preset.training.batch_size
    begin = "start again with --out NEW and "
    if kind == "uniform":
        if temperature > 0.04:
            return f"{begin}a sharper teacher: --set {rule}.temperature='{{kind=\"constant\", value=0.04}}'"
        if preset.heads[loss.head].prototypes > 8192:
            return f"{begin}fewer prototypes: --set heads.{loss.head}.prototypes=8192"
        if temperature > 0.02:
            return f"{begin}a sharper teacher: --set {rule}.temperature='{{kind=\"constant\", value=0.02}}'"
        return f"{begin}more images a step: --batch-size {2 * batch}, with --accumulate 2 where memory is short"
    if isinstance(loss.targets, CenteringConfig) and loss.targets.momentum > 0.9:
        return f"{begin}a faster center: --set {rule}.momentum=0.9"
    if temperature < 0.04:
        return f"{begin}a less sharp teacher: --set {rule}.temperature='{{kind=\"constant\", value=0.04}}'"
    momentum = preset.teacher.momentum
    if momentum.bounds[0] < 0.99:
        key = "value" if isinstance(momentum, Constant) else "start"
        return f"{begin}a slower teacher: --set teacher.momentum.{key}=0.996"
    return f"{begin}more images a step: --batch-size {2 * batch}, with --accumulate 2 where memory is short"
