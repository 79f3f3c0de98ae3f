"""Collapse detection from logged metrics: targets or features that are the same for every image."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from dinocli.engine.schedules import Constant, Warmup
from dinocli.method.losses.targets import CenteringConfig, PrototypeLossConfig
from dinocli.method.preset import Preset

# Thresholds of entropy and information, as fractions of ln K. Runs of `tiny` that were made to collapse reached 0.986
# and 0.013, or 0.005 and 0.013. Runs that learned had 0.1 to 0.5 and 0.18 to 0.38 (docs/results.md).
_UNIFORM, _ONE_SIDED, _NOTHING = 0.975, 0.02, 0.02
# Largest spread of a teacher's unit features that counts as collapse.
_SAME = 0.1
_USUAL_EPS = 0.05  # of the coding rate, as in SimDINO's commands
# Shortest and longest span, in steps. A fresh network gives all images similar outputs for a few hundred steps.
_STEPS = (50, 300)

Kind = Literal["uniform", "one-sided", "constant"]


@dataclass(frozen=True)
class Collapse:
    """Collapse of a loss.

    Attributes:
        kind: `uniform` if every prototype gets the same share, `one-sided` if one prototype gets everything, `constant`
            if features are the same for every image: a teacher's without prototypes, or the predictions of a student of
            features.
        words: One-line description.
        remedy: Suggested change, as command-line options.
    """

    kind: Kind
    words: str
    remedy: str


class CollapseDetector:
    """Detector of targets that no longer carry information about the images.

    Source: arXiv 2104.14294, section 5.3: without sharpening, the targets' entropy rises to ln K; without centering, it
    falls to 0. In both cases the student has nothing left to learn.
    """

    def __init__(self, preset: Preset, steps: int) -> None:
        self.preset = preset
        self.span = max(_STEPS[0], min(_STEPS[1], steps // 4))
        self._lines: deque[tuple[int, Mapping[str, float]]] = deque()
        self._reported: set[str] = set()

    def update(self, step: int, figures: Mapping[str, float]) -> list[Collapse]:
        """Add a logged step, and return the losses' new collapses. A collapse is new again after a recovery.

        Args:
            step: Number of completed steps.
            figures: Logged metrics, including those of `SelfDistillation.metrics`.
        """
        self._lines.append((step, figures))
        if step - self._lines[0][0] < self.span:
            return []
        while step - self._lines[1][0] >= self.span:
            self._lines.popleft()
        new = []
        for name, loss in self.preset.losses.with_targets().items():
            kind = self._classify(name, math.log(self.preset.heads[loss.head].outputs))
            if self._is_new(name, collapsed=kind is not None):
                assert kind is not None
                remedy = _suggest_remedy(self.preset, name, loss, kind)
                new.append(Collapse(kind, self._describe(name, loss, kind), remedy))
        for name, unit in (("simdino", "image"), ("simdino_patches", "patch")):
            if self._is_new(name, collapsed=self._average(f"{name}/spread") < _SAME):
                words = f"constant collapse: for {self.span} steps the teacher's features are the same for any {unit}"
                new.append(Collapse("constant", f"{words} (losses.{name})", _suggest_expansion(self.preset)))
        if self.preset.losses.features:
            new += self._check_features()
        return new

    def _is_new(self, loss: str, *, collapsed: bool) -> bool:
        """Return True if a loss has collapsed and that was not reported since its last recovery."""
        new = collapsed and loss not in self._reported
        (self._reported.add if collapsed else self._reported.discard)(loss)
        return new

    def _average(self, figure: str, missing: float = math.nan) -> float:
        """Return the mean of a metric over the span."""
        return sum(figures.get(figure, missing) for _, figures in self._lines) / len(self._lines)

    def _check_features(self) -> list[Collapse]:
        """Return a new collapse of feature distillation: predictions that do not vary with the teachers' features."""
        cosines = [self._average(f"features/{kind}", missing=0.0) for kind in ("class", "patch")]
        if not self._is_new("features", collapsed=max(cosines) <= _NOTHING):
            return []
        words = f"constant collapse: for {self.span} steps the student predicts the same features for any image"
        return [Collapse("constant", f"{words} (losses.features)", _suggest_lower_rate(self.preset))]

    def _classify(self, loss: str, most: float) -> Kind | None:
        """Return the kind of a loss's collapse or None, from its mean metrics over the span. `most` is ln K."""
        entropy, information = (self._average(f"{loss}/{name}") / most for name in ("teacher_entropy", "information"))
        if not information < _NOTHING:  # also if it is nan
            return None
        return "uniform" if entropy > _UNIFORM else "one-sided" if entropy < _ONE_SIDED else None

    def _describe(self, name: str, loss: PrototypeLossConfig, kind: Kind) -> str:
        teacher = {
            "uniform": "gives every prototype the same share",
            "one-sided": "gives nearly everything to one prototype",
        }[kind]
        unit = "image" if loss.reads == "class" else "patch"
        return f"{kind} collapse: for {self.span} steps the teacher {teacher}, for any {unit} (losses.{name})"


def _suggest_lower_rate(preset: Preset) -> str:
    rate = preset.optimizer.lr
    key, value = ("value", rate.value) if isinstance(rate, (Constant, Warmup)) else ("start", rate.start)
    return f"start again with --out NEW and a lower rate: --set optimizer.lr.{key}={value / 3:.2g}"


def _suggest_expansion(preset: Preset) -> str:
    """Return the first remedy for equal features: a stronger expansion term, then a lower rate."""
    loss = preset.losses.simdino
    if loss is not None and loss.eps > _USUAL_EPS:
        return f"start again with --out NEW and a smaller eps: --set losses.simdino.eps={_USUAL_EPS}"
    return _suggest_lower_rate(preset)


def _suggest_remedy(preset: Preset, name: str, loss: PrototypeLossConfig, kind: Kind) -> str:
    """Return the first remedy, from users' reports or the paper, that this preset does not already use."""
    rule = f"losses.{name}.targets"
    temperature, batch = max(loss.targets.temperature.bounds), preset.training.batch_size
    begin = "start again with --out NEW and "
    if kind == "uniform":
        if temperature > 0.04:
            return f"{begin}a sharper teacher: --set {rule}.temperature='{{kind=\"constant\", value=0.04}}'"
        if preset.heads[loss.head].outputs > 8192:
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
        key = "value" if isinstance(momentum, (Constant, Warmup)) else "start"
        return f"{begin}a slower teacher: --set teacher.momentum.{key}=0.996"
    return f"{begin}more images a step: --batch-size {2 * batch}, with --accumulate 2 where memory is short"
