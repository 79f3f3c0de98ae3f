"""Panels: logged values that are drawn together, each with a description of healthy curves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from dinocli.history import Curve


class LossFacts(NamedTuple):
    """Facts of a loss on prototypes; the value of an uninformative loss is weight * ln(prototypes)."""

    weight: float
    prototypes: int

    @property
    def entropy(self) -> float:
        """Entropy of a target that is uniform over all prototypes, in nats."""
        return math.log(self.prototypes)


@dataclass(frozen=True)
class Lane:
    """Curves on one scale.

    Attributes:
        title: Name and unit of the values.
        curves: Curves with their names in the legend.
        marks: Levels of dotted lines, with their labels.
        log: True for a logarithmic scale.
        whole: True if the scale includes 0.
    """

    title: str
    curves: dict[str, Curve]
    marks: dict[str, float] = field(default_factory=dict)
    log: bool = False
    whole: bool = False


@dataclass(frozen=True)
class Panel:
    """Drawing with a heading.

    Attributes:
        healthy: Description of a healthy curve, in a sentence or two.
        lanes: Lanes from top to bottom, with a shared step axis.
    """

    title: str
    healthy: str
    lanes: list[Lane]


def panels(history: Mapping[str, Curve], losses: Mapping[str, LossFacts]) -> list[Panel]:
    """Return the panels that have logged values.

    Args:
        history: Logged values by key.
        losses: Facts of the losses on prototypes, by name.
    """
    every = [*_training(history, losses), *_monitor(history), *_schedules(history), *_machine(history)]
    filled = [Panel(p.title, p.healthy, [lane for lane in p.lanes if lane.curves]) for p in every]
    return [panel for panel in filled if panel.lanes]


def _training(history: Mapping[str, Curve], losses: Mapping[str, LossFacts]) -> list[Panel]:
    parts = _pick(history, {name: name for name in (*losses, "ibot", "koleo", "dino")})
    whole = _pick(history, {"loss": "loss"})
    curves = whole if whole and len(parts) < 2 else whole | parts
    flat = {f"ln K = {facts.weight * facts.entropy:.2f}": facts.weight * facts.entropy for facts in losses.values()}
    uniform = {f"ln K = {facts.entropy:.2f}": facts.entropy for facts in losses.values()}
    return [
        Panel(
            "Loss",
            "It starts near the dotted line and falls. With a vision transformer it often rises again while the "
            "teacher temperature warms up, and then falls once more. A loss that stays on the line tells nothing of "
            "any image: take a lower teacher temperature or fewer prototypes.",
            [Lane("loss, nats", curves, flat)],
        ),
        Panel(
            "What the teacher tells",
            "There are two ways to collapse: entropy on the dotted line, all prototypes alike, or at 0, one for all "
            "images. In health it stays away from both; the KL of the student from the teacher stays above 0, and the "
            "information, what a target tells of its own image, well above 0.",
            [
                Lane("entropy, nats", _ending(history, "/teacher_entropy"), uniform, whole=True),
                Lane("KL, nats", _ending(history, "/kl"), whole=True),
                Lane("information, nats", _ending(history, "/information"), whole=True),
            ],
        ),
        Panel(
            "Prototypes in use",
            "Over a hundred steps. After the first epochs it no longer falls; near 0 a few prototypes take all images.",
            [Lane("% of all", _ending(history, "/prototypes", 100), whole=True)],
        ),
        Panel(
            "Spread of the features",
            "Of the teacher's normalized features: 1 where they lie in all directions, 0 where all images get the "
            "same. It stays well above 0.",
            [Lane("spread", _pick(history, {"features": "feature_std"}), whole=True)],
        ),
        Panel(
            "Gradient norm",
            "Before clipping. After the warm-up it stays within a factor of ten or so; spikes that grow ask for a "
            "lower rate or a tighter clip.",
            [Lane("norm, logarithmic", _pick(history, {"gradient": "grad_norm"}), log=True)],
        ),
        Panel(
            "Steps left out",
            "Steps whose loss or gradient was not finite, and which changed nothing. There should be none, or few that "
            "do not become more.",
            [Lane("steps so far", _if_any(_pick(history, {"skipped": "skipped"})), whole=True)],
        ),
    ]


def _monitor(history: Mapping[str, Curve]) -> list[Panel]:
    return [
        Panel(
            "k-NN accuracy",
            "Labelled images told by their neighbours. It rises for most of the run, fastest early; where it falls for "
            "long while the loss falls too, look at the pictures below.",
            [Lane("% right", _pick(history, {"k-NN": "knn"}))],
        ),
        Panel(
            "Features without labels",
            "Effective rank: how many directions the features use; near 1 all images look alike. Uniformity: how "
            "evenly they lie, from 0, all alike, to about -4. Both may worsen in the first epochs; in health they do "
            "not go on so.",
            [
                Lane("effective rank", _pick(history, {"rank": "rank"})),
                Lane("uniformity", _pick(history, {"uniformity": "uniformity"})),
            ],
        ),
    ]


def _schedules(history: Mapping[str, Curve]) -> list[Panel]:
    return [
        Panel(
            "Rate and weight decay",
            "As the settings have them: mostly the rate warms up and then falls, and the weight decay rises.",
            [
                Lane("learning rate", _pick(history, {"rate": "lr"}), whole=True),
                Lane("weight decay", _pick(history, {"weight decay": "weight_decay"})),
            ],
        ),
        Panel(
            "Momentum and temperature",
            "As the settings have them: the teacher's momentum rises to 1, so that it moves less and less; its "
            "temperature warms up in the first epochs, or stays.",
            [
                Lane("momentum", _pick(history, {"momentum": "momentum"})),
                Lane("temperature", _ending(history, "/temperature")),
            ],
        ),
    ]


def _machine(history: Mapping[str, Curve]) -> list[Panel]:
    return [
        Panel(
            "Speed and waiting",
            "Both are flat. Where a step waits for data for more than a few percent of its time, more workers, a cache "
            "or smaller files make the run faster.",
            [
                Lane("images a second", _pick(history, {"speed": "images_per_second"}), whole=True),
                Lane("% of the time waited", _pick(history, {"waited": "data_wait"}, 100), whole=True),
            ],
        ),
        Panel(
            "Memory",
            "The most in use so far. After the first steps it is flat; one that keeps growing ends the run.",
            [Lane("GiB", _pick(history, {"memory": "peak_memory"}, 2**-30), whole=True)],
        ),
    ]


def _pick(history: Mapping[str, Curve], keys: Mapping[str, str], scale: float = 1.0) -> dict[str, Curve]:
    there = {name: history[key] for name, key in keys.items() if key in history}
    return {name: Curve(c.steps, c.values * scale) for name, c in there.items()}


def _ending(history: Mapping[str, Curve], end: str, scale: float = 1.0) -> dict[str, Curve]:
    """Return the curves of one kind, by the name of their loss."""
    return _pick(history, {key.removesuffix(end): key for key in history if key.endswith(end)}, scale)


def _if_any(curves: dict[str, Curve]) -> dict[str, Curve]:
    return {name: curve for name, curve in curves.items() if (curve.values > 0).any()}
