from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import SMALL

from dinocli.core.errors import DinoError
from dinocli.data.sources.open import image_folder
from dinocli.method.preset import load_preset
from dinocli.train.collapse import Collapse, CollapseDetector
from dinocli.train.plan import Plan
from dinocli.train.pretrain import pretrain

K = 256
# Logged entropy and information of runs of `tiny` on photos at several steps, in nats.
LEARNS = [(2.43, 0.81), (3.1, 0.9), (2.6, 1.2), (2.2, 1.6), (2.0, 1.9)]
ONE_SIDED = [(0.0143, 0.028), (0.0458, 0.163), (0.0421, 0.107), (0.0249, 0.0566), (0.0151, 0.0228)]
UNIFORM = [(5.44, 0.072), (5.45, 0.0645), (5.46, 0.0626), (5.47, 0.0613), (5.47, 0.0642)]


def detect(series: list[tuple[float, float]], overrides: list[str] = [], times: int = 10) -> list[tuple[int, Collapse]]:  # noqa: B006
    detector = CollapseDetector(load_preset("tiny-dino", overrides), 400)
    found = []
    for i, (entropy, information) in enumerate(series * times):
        figures = {"dino/teacher_entropy": entropy, "dino/information": information}
        found += [(10 * i, collapse) for collapse in detector.update(10 * i, figures)]
    return found


def test_a_run_that_learns_is_not_reported() -> None:
    assert detect(LEARNS) == []


@pytest.mark.parametrize(("series", "kind"), [(ONE_SIDED, "one-sided"), (UNIFORM, "uniform")])
def test_collapse_is_reported_once_and_early(series: list[tuple[float, float]], kind: str) -> None:
    ((step, collapse),) = detect(series)
    assert collapse.kind == kind
    assert step == 100, "a quarter of a run of 400 steps"
    assert kind in collapse.words
    assert "for 100 steps" in collapse.words


def test_a_second_collapse_is_reported_again() -> None:
    assert [c.kind for _, c in detect(UNIFORM * 4 + LEARNS * 4, times=2)] == ["uniform", "uniform"]


def test_sharp_or_uniform_targets_with_information_are_no_collapse() -> None:
    most = math.log(load_preset("tiny-dino").heads["dino"].prototypes)
    assert detect([(0.001 * most, 0.5 * most)] * 30) == []
    assert detect([(0.98 * most, 0.03 * most)] * 30) == []


def test_a_slow_start_is_no_collapse() -> None:
    """An untrained network gives all images nearly the same output for some steps."""
    assert detect([*UNIFORM[:1] * 9, *LEARNS], times=1) == []


def test_a_preset_without_these_figures_is_never_reported() -> None:
    detector = CollapseDetector(load_preset("tiny-dino"), 400)
    assert not any(detector.update(step, {"loss": 1.0}) for step in range(0, 400, 10))


@pytest.mark.parametrize(
    ("series", "overrides", "remedy"),
    [
        (UNIFORM, ["losses.dino.targets.temperature.value=0.07"], "temperature='{kind=\"constant\", value=0.04}'"),
        (UNIFORM, [], "temperature='{kind=\"constant\", value=0.02}'"),
        (UNIFORM, ["losses.dino.targets.temperature.value=0.02"], "--batch-size 96"),
        (ONE_SIDED, ["losses.dino.targets.momentum=0.999"], "losses.dino.targets.momentum=0.9"),
        (ONE_SIDED, [], "temperature='{kind=\"constant\", value=0.04}'"),
        (ONE_SIDED, ["losses.dino.targets.temperature.value=0.04"], "teacher.momentum.start=0.996"),
    ],
)
def test_the_remedy_fits_the_preset_and_parses(
    series: list[tuple[float, float]], overrides: list[str], remedy: str
) -> None:
    ((_, collapse),) = detect(series, overrides)
    assert remedy in collapse.remedy
    if "--set " in collapse.remedy:
        changed = collapse.remedy.partition("--set ")[2].replace("'", "")
        assert load_preset("tiny-dino", [*overrides, changed]) != load_preset("tiny-dino", overrides)


def test_fewer_prototypes_are_the_first_remedy_for_many() -> None:
    large = math.log(65536) / math.log(K)
    series = [(entropy * large, information) for entropy, information in UNIFORM]
    ((_, collapse),) = detect(series, ["heads.dino.prototypes=65536", "losses.dino.targets.temperature.value=0.04"])
    assert collapse.remedy.endswith("--set heads.dino.prototypes=8192")


@pytest.fixture
def flat(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """Plan of a run without sharpening, so that the teacher gives every prototype the same share."""
    monkeypatch.chdir(tmp_path)
    dull = ["losses.dino.targets.temperature.value=5.0", "heads.dino.batch_norm=false", "training.epochs=16"]
    preset = load_preset("tiny-dino", [*SMALL, *dull])
    return Plan("tiny", preset, image_folder(images), 64, Path("runs/x"), torch.device("cpu"), 0, None)


def test_a_collapsed_run_warns_or_stops_with_its_state_saved(flat: Plan) -> None:
    said: list[str] = []
    run = pretrain(flat, lambda p: None, said.append)
    assert run.step == 64
    assert said[0].startswith("warning: uniform collapse: for 50 steps")
    assert said[1].startswith("hint: start again with --out NEW and a sharper teacher")
    with pytest.raises(DinoError, match="uniform collapse"):
        pretrain(replace(flat, out=Path("runs/y"), on_collapse="stop"), lambda p: None)
    assert [p.name for p in Path("runs/y/state").iterdir()].count("60") == 1


def test_collapse_of_the_patch_loss_is_detected_too() -> None:
    preset = load_preset("tiny-dinov2")
    detector, found = CollapseDetector(preset, 400), []
    for i in range(20):
        figures = {}
        for loss, (entropy, information) in (("dino", LEARNS[i % 5]), ("ibot", UNIFORM[i % 5])):
            figures |= {f"{loss}/teacher_entropy": entropy, f"{loss}/information": information}
        found += detector.update(10 * i, figures)
    (collapse,) = found
    assert collapse.words.endswith("for any patch (losses.ibot)")
    changed = collapse.remedy.partition("--set ")[2].replace("'", "")
    assert changed.startswith("losses.ibot.targets.temperature=")
    assert load_preset("tiny-dinov2", [changed]).losses.ibot != preset.losses.ibot


def test_all_losses_that_collapse_in_one_step_are_reported() -> None:
    detector = CollapseDetector(load_preset("tiny-dinov2"), 400)
    for i in range(20):
        figures = {}
        for loss in ("dino", "ibot"):
            figures |= {f"{loss}/teacher_entropy": UNIFORM[i % 5][0], f"{loss}/information": UNIFORM[i % 5][1]}
        words = [collapse.words for collapse in detector.update(10 * i, figures)]
        if words:
            break
    assert ["losses.dino" in words[0], "losses.ibot" in words[1]] == [True, True]
    assert detector.update(10 * i + 10, figures) == []


def test_a_stopped_run_names_all_its_collapses(flat: Plan) -> None:
    dull = [f"{loss}.targets.temperature.value=5.0" for loss in ("losses.dino", "losses.ibot")]
    heads = ["heads.dino.batch_norm=false", "heads.ibot.batch_norm=false", "heads.ibot.prototypes=16"]
    preset = load_preset("tiny-dinov2", [*SMALL, *dull, *heads, "training.epochs=16"])
    with pytest.raises(DinoError, match=r"losses\.dino.*; .*losses\.ibot") as error:
        pretrain(replace(flat, preset=preset, on_collapse="stop"), lambda p: None)
    for loss in ("dino", "ibot"):
        assert f"--set losses.{loss}.targets.temperature" in error.value.hint


@pytest.mark.parametrize(("temperature", "noticed"), [("5.0", True), ("0.05", False)])
def test_equal_targets_for_all_patches_are_reported(temperature: str, noticed: bool, flat: Plan) -> None:
    heads = ["heads.dino.batch_norm=false", "heads.ibot.batch_norm=false", "heads.ibot.prototypes=16"]
    dull = [f"losses.ibot.targets.temperature.value={temperature}", "training.epochs=16"]
    said: list[str] = []
    pretrain(replace(flat, preset=load_preset("tiny-dinov2", [*SMALL, *heads, *dull])), lambda p: None, said.append)
    assert len([line for line in said if "uniform collapse" in line and "(losses.ibot)" in line]) == noticed
    assert len([line for line in said if "--set losses.ibot.targets.temperature" in line]) == noticed


@pytest.mark.parametrize(
    ("overrides", "remedy"),
    [(["losses.simdino.eps=0.5"], "--set losses.simdino.eps=0.05"), ([], "--set optimizer.lr.start=0.0013")],
)
def test_equal_features_without_prototypes_are_reported_once(overrides: list[str], remedy: str) -> None:
    preset = load_preset("tiny-simdino", overrides)
    detector, found = CollapseDetector(preset, 400), []
    for i in range(30):
        found += detector.update(10 * i, {"simdino/spread": 0.03, "simdino/cosine": 1.0})
    (collapse,) = found
    assert collapse.kind == "constant"
    assert collapse.words.startswith(
        "constant collapse: for 100 steps the teacher's features are the same for any image"
    )
    assert collapse.words.endswith("(losses.simdino)")
    assert collapse.remedy.endswith(remedy)
    assert load_preset("tiny-simdino", [*overrides, collapse.remedy.partition("--set ")[2]]) != preset
    for i in range(30, 60):
        assert detector.update(10 * i, {"simdino/spread": 0.6, "simdino_patches/spread": math.nan}) == []
    words = [c.words for i in range(60, 90) for c in detector.update(10 * i, {"simdino_patches/spread": 0.0})]
    assert [each.endswith("for any patch (losses.simdino_patches)") for each in words] == [True]


def test_a_run_without_expansion_collapses_and_warns(flat: Plan) -> None:
    options = "backbone.options={img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2}"
    head = "heads.features={hidden=16, bottleneck=8, layers=3}"
    said: list[str] = []
    preset = load_preset("tiny-simdino", [options, head, *SMALL[4:], "losses.simdino.eps=1e6", "training.epochs=16"])
    pretrain(replace(flat, preset=preset), lambda p: None, said.append)
    assert said[0].startswith("warning: constant collapse: for 50 steps the teacher's features are the same")
    assert said[1] == "hint: start again with --out NEW and a smaller eps: --set losses.simdino.eps=0.05"


def test_a_student_of_features_that_predicts_the_same_for_every_image_is_reported_once() -> None:
    detector = CollapseDetector(load_preset("distill-features"), 400)
    found = []
    for i in range(30):
        found += detector.update(10 * i, {"features/class": 0.01, "features/patch": -0.01})
    (collapse,) = found
    assert collapse.kind == "constant" and "for 100 steps the student predicts the same" in collapse.words
    assert collapse.remedy.endswith("--set optimizer.lr.start=0.00017")
    for i in range(30, 60):
        assert detector.update(10 * i, {"features/class": 0.3, "features/patch": 0.01}) == []
