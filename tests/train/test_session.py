from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_pretrain import Spoiled, six_steps  # noqa: F401

from dinocli.core.errors import DinoError
from dinocli.engine.trainer import Trainer
from dinocli.train import pretrain as pretraining
from dinocli.train.plan import Plan, Saving
from dinocli.train.pretrain import pretrain
from dinocli.train.state import saved_states
from dinocli.weights.checkpoint import read_weights


def test_a_full_disk_at_the_start_leaves_no_folder(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    from dinocli.core import atomic

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as error:
        pretrain(plan, lambda p: None)
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, "runs/tiny-1/state/0")
    assert not plan.out.exists()


def test_bad_images_are_listed(plan: Plan, images: Path) -> None:
    (images / "a" / "0001.png").write_bytes(b"no image")
    run = pretrain(plan, lambda p: None)
    assert (run.folder / "bad_images.txt").read_text().startswith("'a/0001.png'\tnot an image")
    assert list(run.bad.reasons) == ["a/0001.png"]
    with (run.folder / "bad_images.txt").open("ab") as file:
        file.write(b"\xff torn\n")
    assert pretrain(replace(plan, stop=7), lambda p: None).step == 7, "a damaged list does not stop the run"


@pytest.mark.parametrize("every", [None, 1, 5], ids=str)
def test_non_finite_weights_are_never_saved_and_end_the_run(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, every: int | None
) -> None:
    monkeypatch.setattr(pretraining, "Trainer", Spoiled)
    with pytest.raises(DinoError, match=r"after step [456] teacher.backbone.model.cls_token holds 1 of \d+") as error:
        pretrain(replace(plan, saving=Saving(seconds=None, steps=every)), lambda p: None)
    assert "a lower --set optimizer.lr.start=VALUE" in error.value.hint
    last_good = 3 if every == 1 else 0
    assert next(folder.name for folder, _ in saved_states(plan.out)) == str(last_good)
    assert read_weights(plan.out).step == last_good


def test_an_out_of_memory_error_suggests_more_parts(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    from dinocli.engine.trainer import Trainer

    def full(self: Trainer, batch: object, *, log: bool) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Trainer, "step", full)
    same = ", with the same gradient; or --batch-size 2"
    for parts, again, hint in (
        (1, False, f"--accumulate 2 or --recompute{same}"),
        (1, True, f"--accumulate 2{same}"),
        (4, False, f"--recompute{same}"),
        (4, True, "--batch-size 2"),
    ):
        with pytest.raises(
            DinoError, match="too small for a batch of 4" + (f" in {parts} parts" if parts > 1 else "\n")
        ) as error:
            pretrain(replace(plan, accumulate=parts, recompute=again), lambda p: None)
        assert error.value.hint == hint
    assert [folder.name for folder, _ in saved_states(plan.out)] == ["0"], "the interrupted step is not saved"


@pytest.mark.parametrize("step", [0, 2])
def test_out_of_memory_in_the_views_is_an_error_and_the_steps_before_are_saved(
    plan: Plan, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dinocli.data.loader.train import TrainBatches

    made: list[int] = []

    def full(*args: object) -> torch.Tensor:
        made.append(len(made))
        if len(made) > 2 * step:  # global and local views are made apart
            raise torch.OutOfMemoryError
        return normalized(*args)

    normalized = TrainBatches._normalized
    monkeypatch.setattr(TrainBatches, "_normalized", full)
    with pytest.raises(DinoError, match="too small for the views of a batch of 4") as error:
        pretrain(plan, lambda p: None)
    assert error.value.hint == "--batch-size 2"
    assert next(folder.name for folder, _ in saved_states(plan.out)) == str(step)


@pytest.mark.parametrize("step", [0, 3])
def test_out_of_memory_in_the_monitor_is_an_error_and_the_steps_before_are_saved(
    plan: Plan, labelled: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dinocli.train import knn_monitor

    def full(network: object, pixels: torch.Tensor, views: object) -> torch.Tensor:
        seen.append(network)
        if len(seen) > 2 * (step > 0):  # both splits, before the first step
            raise torch.OutOfMemoryError
        return tokens_of(network, pixels, views)

    seen: list[object] = []
    tokens_of = knn_monitor.class_tokens
    monkeypatch.setattr(knn_monitor, "class_tokens", full)
    plan = replace(plan, monitor=str(labelled), monitor_every=3)
    for report, without in ((False, "no --monitor"), (True, "no --monitor and --no-report")):
        seen.clear()
        out = plan.out / str(report)
        with pytest.raises(DinoError, match="too small for an evaluation beside the networks in training") as error:
            pretrain(replace(plan, report=report, out=out), lambda p: None)
        assert error.value.hint == f"{without} or --batch-size 2"
        assert next(folder.name for folder, _ in saved_states(out)) == str(step)
