"""Charts of a run: logged values that are drawn together, with a description of healthy curves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from dinocli.viz.history import Curve

_LOSSES = ("ibot", "simdino", "simdino_patches", "koleo", "sigreg", "gram", "dino")


class LossFacts(NamedTuple):
    """Weight and prototypes of a loss, which is weight * ln(prototypes) if the targets carry no information."""

    weight: float
    prototypes: int

    @property
    def entropy(self) -> float:
        """Entropy of a target that is uniform over all prototypes, in nats."""
        return math.log(self.prototypes)


@dataclass(frozen=True)
class Axis:
    """Curves on one scale.

    Attributes:
        title: Name and unit of the values.
        curves: Curves with their names in the legend.
        marks: Levels of dotted lines, with their labels.
        log: True for a logarithmic scale.
        whole: True if the scale includes 0.
        legend: True if the names of several curves are drawn beside the title.
    """

    title: str
    curves: dict[str, Curve]
    marks: dict[str, float] = field(default_factory=dict)
    log: bool = False
    whole: bool = False
    legend: bool = True


@dataclass(frozen=True)
class Chart:
    """Axes with a heading, drawn as one picture.

    Attributes:
        healthy: Description of a healthy curve, in a sentence or two.
        axes: Axes from top to bottom, with a shared step axis.
    """

    title: str
    healthy: str
    axes: list[Axis]


def charts(history: Mapping[str, Curve], losses: Mapping[str, LossFacts]) -> list[Chart]:
    """Return the charts that have logged values.

    Args:
        history: Logged values by key.
        losses: Weight and prototypes of each loss on prototypes, by name.
    """
    features = _pick(history, {"class tokens": "features/class", "patches": "features/patch"})
    candidates = [
        *(_chart_features(history, features) if features else []),
        *_chart_training(history, losses, features=bool(features)),
        *_chart_monitor(history),
        *_chart_schedules(history),
        *_chart_machine(history),
    ]
    with_curves = [
        Chart(chart.title, chart.healthy, [axis for axis in chart.axes if axis.curves]) for chart in candidates
    ]
    return [chart for chart in with_curves if chart.axes]


def _chart_features(history: Mapping[str, Curve], cosines: dict[str, Curve]) -> list[Chart]:
    return [
        Chart(
            "Loss",
            "The weighted distance from the teachers' features falls, fast at first, then slowly. It rises only if the "
            "learning rate is too high.",
            [Axis("loss", _pick(history, {"loss": "loss"}))],
        ),
        Chart(
            "Agreement with the teachers",
            "Cosine between the student's predictions and the teachers' standardized features: 0 if every image gets "
            "the same prediction, 1 if all are exact. It rises for most of the run, and stays below 1 for a student "
            "that is smaller than its teachers.",
            [Axis("cosine", cosines, whole=True)],
        ),
    ]


def _chart_training(
    history: Mapping[str, Curve], losses: Mapping[str, LossFacts], *, features: bool = False
) -> list[Chart]:
    parts = _pick(history, {name: name for name in (*losses, *_LOSSES)})
    total = _pick(history, {"loss": "loss"})
    curves = total if total and len(parts) < 2 else total | parts
    if features:  # another chart explains their loss
        curves = {}
    loss_level = {
        f"ln K = {facts.weight * facts.entropy:.2f}": facts.weight * facts.entropy for facts in losses.values()
    }
    entropy_level = {f"ln K = {facts.entropy:.2f}": facts.entropy for facts in losses.values()}
    return [
        Chart(
            "Loss",
            "The loss starts near the dotted line and falls. With a vision transformer it often rises while the "
            "teacher temperature warms up, then falls again. A loss that stays on the line means that targets carry no "
            "information: lower the teacher temperature or use fewer prototypes.",
            [Axis("loss, nats", curves, loss_level)],
        ),
        Chart(
            "Teacher outputs",
            "Training collapses in two ways: entropy on the dotted line (uniform over the prototypes), or entropy 0 "
            "(one prototype for all images). A healthy entropy stays away from both. The KL divergence of student "
            "from teacher stays above 0. The information that a target carries about its image stays well above 0.",
            [
                Axis("entropy, nats", _pick_by_suffix(history, "/teacher_entropy"), entropy_level, whole=True),
                Axis("KL, nats", _pick_by_suffix(history, "/kl"), whole=True),
                Axis("information, nats", _pick_by_suffix(history, "/information"), whole=True),
            ],
        ),
        Chart(
            "Agreement and expansion",
            "Without prototypes, collapse is a cosine near 1 with an expansion near 0: all features are the same. A "
            "healthy cosine rises slowly and the expansion stays well above 0. The loss may be negative.",
            [
                Axis("cosine", _pick_by_suffix(history, "/cosine"), whole=True),
                Axis("expansion, nats", _pick_by_suffix(history, "/expansion"), whole=True),
            ],
        ),
        Chart(
            "Prototypes in use",
            "Share of prototypes used over a hundred steps. It stops falling after the first epochs. Near 0, a few "
            "prototypes receive all images.",
            [Axis("% of prototypes", _pick_by_suffix(history, "/prototypes", 100), whole=True)],
        ),
        Chart(
            "Spread of the features",
            "Standard deviation of the teacher's normalized features, scaled: 1 if they point in all directions, 0 if "
            "all images have the same features. It stays well above 0.",
            [
                Axis(
                    "spread",
                    _pick(history, {"features": "feature_std"}) | _pick_by_suffix(history, "/spread"),
                    whole=True,
                )
            ],
        ),
        Chart(
            "Gradient norm",
            "Norm before clipping. After the warm-up it stays within a factor of about ten. If spikes grow, lower the "
            "learning rate or the clipping threshold.",
            [Axis("norm (log scale)", _pick(history, {"gradient": "grad_norm"}), log=True)],
        ),
        Chart(
            "Skipped steps",
            "Steps without an update, because the loss or gradient was not finite. A healthy run has none, or a few "
            "early ones.",
            [Axis("total so far", _drop_zeros(_pick(history, {"skipped": "skipped"})), whole=True)],
        ),
    ]


def _chart_monitor(history: Mapping[str, Curve]) -> list[Chart]:
    return [
        Chart(
            "k-NN accuracy",
            "Accuracy of a k-NN classifier on labelled images. It rises for most of the run, fastest early. If it "
            "falls for long while the loss also falls, check the pictures below.",
            [Axis("accuracy, %", _pick(history, {"k-NN": "knn"}))],
        ),
        Chart(
            "Accuracy of the classifier",
            "Accuracy on the held-out images, or their mean average precision if they have several classes. The best "
            "weights are kept.",
            [Axis("accuracy, %", _pick(history, {"held out": "accuracy"}))],
        ),
        Chart(
            "Features without labels",
            "Effective rank: the number of directions that the features use; near 1, all images have equal features. "
            "Uniformity: from 0 (all features equal) to about -4 (evenly spread). Both may worsen in the first epochs, "
            "but not for longer."
            + (" LiDAR: the number of directions that distinguish photos." if "lidar" in history else ""),
            [
                Axis("effective rank", _pick(history, {"rank": "rank"})),
                Axis("uniformity", _pick(history, {"uniformity": "uniformity"})),
                *([Axis("LiDAR", _pick(history, {"LiDAR": "lidar"}))] if "lidar" in history else []),
            ],
        ),
    ]


def _chart_schedules(history: Mapping[str, Curve]) -> list[Chart]:
    return [
        Chart(
            "Learning rate and weight decay",
            "Schedules from the settings. Usually the learning rate warms up, then decays, and the weight decay rises.",
            [
                Axis("learning rate", _pick(history, {"rate": "lr"}), whole=True),
                Axis("weight decay", _pick(history, {"weight decay": "weight_decay"})),
            ],
        ),
        Chart(
            "Momentum and temperature",
            "Schedules from the settings. The teacher's momentum rises to 1, so its updates become smaller. Its "
            "temperature warms up in the first epochs, or is constant.",
            [
                Axis("momentum", _pick(history, {"momentum": "momentum"})),
                Axis("temperature", _pick_by_suffix(history, "/temperature")),
            ],
        ),
    ]


def _chart_machine(history: Mapping[str, Curve]) -> list[Chart]:
    return [
        Chart(
            "Speed and data wait",
            "Both are flat. If steps wait for data more than a few percent of the time, more workers, a cache or "
            "smaller files speed up training.",
            [
                Axis("images per second", _pick(history, {"speed": "images_per_second"}), whole=True),
                Axis("waiting for data, % of time", _pick(history, {"data wait": "data_wait"}, 100), whole=True),
            ],
        ),
        Chart(
            "Memory",
            "Peak memory so far. It is flat after the first steps. If it keeps growing, memory will run out.",
            [Axis("GiB", _pick(history, {"memory": "peak_memory"}, 2**-30), whole=True)],
        ),
    ]


def _pick(history: Mapping[str, Curve], keys: Mapping[str, str], scale: float = 1.0) -> dict[str, Curve]:
    logged = {name: history[key] for name, key in keys.items() if key in history}
    return {name: Curve(c.steps, c.values * scale) for name, c in logged.items()}


def _pick_by_suffix(history: Mapping[str, Curve], suffix: str, scale: float = 1.0) -> dict[str, Curve]:
    """Return the curves whose keys end in a suffix, by the part before it: the name of the loss."""
    return _pick(history, {key.removesuffix(suffix): key for key in history if key.endswith(suffix)}, scale)


def _drop_zeros(curves: dict[str, Curve]) -> dict[str, Curve]:
    return {name: curve for name, curve in curves.items() if (curve.values > 0).any()}
