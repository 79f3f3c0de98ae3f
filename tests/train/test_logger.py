from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import SMALL

from dinocli.core.errors import DinoError
from dinocli.data.sources.open import image_folder
from dinocli.method.preset import load_preset
from dinocli.train.logger import Progress
from dinocli.train.plan import Plan
from dinocli.train.pretrain import pretrain


@pytest.fixture
def plan(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.chdir(tmp_path)
    return Plan(
        "tiny", load_preset("tiny-dino", SMALL), image_folder(images), 25, Path("run"), torch.device("cpu"), 0, None
    )


def lines(plan: Plan) -> list[dict[str, float]]:
    return [json.loads(line) for line in (plan.out / "metrics.jsonl").read_text().splitlines()]


def test_a_logged_line_has_all_figures(plan: Plan) -> None:
    seen: list[Progress] = []
    pretrain(plan, seen.append)
    assert [line["step"] for line in lines(plan)] == [1, 10, 20, 25] == [p.step for p in seen]
    last = lines(plan)[-1]
    assert list(last) == [
        "step", "epoch", "loss", "grad_norm", "dino", "dino/teacher_entropy", "dino/kl", "dino/information",
        "dino/prototypes", "dino/temperature", "feature_std", "momentum", "lr", "weight_decay", "images_per_second",
        "data_wait", "peak_memory", "skipped",
    ]  # fmt: skip
    assert last["loss"] == pytest.approx(last["dino/teacher_entropy"] + last["dino/kl"], rel=1e-5)
    assert 1 / 16 <= last["dino/prototypes"] <= 1
    assert 0 < last["feature_std"] <= 1
    at = replace(plan.clock, step=24)
    assert last["momentum"] == plan.preset.teacher.momentum.at(at)
    assert last["dino/temperature"] == 0.03
    assert (last["skipped"], last["epoch"]) == (0, 25 / 4)


def test_metrics_are_computed_only_for_logged_steps(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps without a log compute no metrics and do not wait for the device."""
    from dinocli.method.distillation import SelfDistillation

    computed, read = [], []
    metrics, number = SelfDistillation.metrics, torch.Tensor.__float__
    monkeypatch.setattr(SelfDistillation, "metrics", lambda *a: computed.append(1) or metrics(*a))
    monkeypatch.setattr(torch.Tensor, "__float__", lambda t: read.append(1) or number(t))
    pretrain(plan, lambda p: None)
    assert len(computed) == 4
    assert len(read) == 4 * 8, "loss, dino, gradient norm and five metrics are tensors; the others are plain numbers"


def test_a_resumed_run_removes_the_lines_that_it_repeats(plan: Plan) -> None:
    pretrain(replace(plan, stop=12), lambda p: None)
    with (plan.out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "loss": 1.0}\n{"step": 2')
    pretrain(plan, lambda p: None)
    assert [line["step"] for line in lines(plan)] == [1, 10, 12, 20, 25]
    assert lines(plan)[3]["loss"] != 1.0


def test_a_monitor_that_cannot_be_read_is_an_error_before_anything_is_written(plan: Plan) -> None:
    with pytest.raises(DinoError, match="missing"):
        pretrain(replace(plan, monitor="missing"), lambda p: None)
    assert not plan.out.exists()


def test_a_run_with_a_report_learns_the_same_bits_and_draws_it(plan: Plan) -> None:
    alone = pretrain(plan, lambda p: None)
    drawn = replace(plan, out=Path("drawn"), report=True, monitor_every=10)
    assert pretrain(drawn, lambda p: None).checkpoint.read_bytes() == alone.checkpoint.read_bytes()
    assert (drawn.out / "curves.png").is_file()
    page = (drawn.out / "report.html").read_text()
    assert page.count("data:image/jpeg") >= 3, "photos, maps and neighbours"
    assert [line["step"] for line in lines(drawn) if "rank" in line and "uniformity" in line] == [0, 10, 20, 25]
    assert {p.name for p in (drawn.out / "pictures").iterdir()} >= {"photos.jpg", "attention-0.jpg", "attention-25.jpg"}


def test_a_report_that_cannot_be_drawn_does_not_end_the_run(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(folder: Path) -> None:
        raise ValueError("no ink")

    monkeypatch.setattr("dinocli.viz.report.write_report", broken)
    said: list[str] = []
    assert pretrain(replace(plan, report=True), lambda p: None, said.append).step == 25
    assert said == ["note: the report could not be drawn: no ink"]
