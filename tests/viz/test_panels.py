from __future__ import annotations

import math

import numpy as np
import pytest

from dinocli.viz.history import Curve
from dinocli.viz.panels import LossFacts, charts

DINO = {"dino": LossFacts(1.0, 256)}


def curve(*values: float) -> Curve:
    return Curve(np.arange(1.0, len(values) + 1), np.array(values, dtype=float))


def history(*keys: str) -> dict[str, Curve]:
    return {key: curve(3, 2, 1) for key in keys}


@pytest.mark.parametrize(
    ("key", "title"),
    [
        ("loss", "Loss"),
        ("dino/teacher_entropy", "Teacher outputs"),
        ("dino/kl", "Teacher outputs"),
        ("dino/information", "Teacher outputs"),
        ("dino/prototypes", "Prototypes in use"),
        ("feature_std", "Spread of the features"),
        ("grad_norm", "Gradient norm"),
        ("skipped", "Skipped steps"),
        ("features/class", "Agreement with the teachers"),
        ("features/patch", "Agreement with the teachers"),
        ("knn", "k-NN accuracy"),
        ("rank", "Features without labels"),
        ("uniformity", "Features without labels"),
        ("lr", "Learning rate and weight decay"),
        ("weight_decay", "Learning rate and weight decay"),
        ("momentum", "Momentum and temperature"),
        ("dino/temperature", "Momentum and temperature"),
        ("images_per_second", "Speed and data wait"),
        ("data_wait", "Speed and data wait"),
        ("peak_memory", "Memory"),
    ],
)
def test_each_value_has_its_chart(key: str, title: str) -> None:
    (chart,) = charts(history(key), DINO)
    assert chart.title == title and len(chart.axes) == 1 and chart.healthy.endswith(".")


def test_charts_without_values_are_omitted() -> None:
    assert charts({}, DINO) == []
    assert charts(history("unheard_of"), DINO) == []
    assert charts({"skipped": curve(0, 0)}, DINO) == [], "no chart if no step was skipped"


def test_parts_of_a_loss_are_drawn_if_there_are_several() -> None:
    assert list(charts(history("loss", "dino"), DINO)[0].axes[0].curves) == ["loss"]
    both = DINO | {"ibot": LossFacts(0.5, 16)}
    axis = charts(history("loss", "dino", "ibot"), both)[0].axes[0]
    assert set(axis.curves) == {"loss", "dino", "ibot"}
    assert list(axis.marks.values()) == pytest.approx([math.log(256), 0.5 * math.log(16)])


def test_the_collapse_line_is_at_ln_k() -> None:
    axis = charts(history("dino/teacher_entropy"), {"dino": LossFacts(2.0, 1024)})[0].axes[0]
    assert axis.marks == {"ln K = 6.93": math.log(1024)}
    assert charts(history("loss"), {})[0].axes[0].marks == {}, "no line for an unknown preset"


def test_feature_distillation_has_its_own_chart_of_the_loss() -> None:
    drawn = charts(history("loss", "features/class", "features/patch"), {})
    assert [chart.title for chart in drawn] == ["Loss", "Agreement with the teachers"]
    assert "prototypes" not in drawn[0].healthy
