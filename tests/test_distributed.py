from __future__ import annotations

from pathlib import Path

import torch
from conftest import TOLERANCE, Original, assert_original
from torch import distributed, multiprocessing

from dinocli.distributed import mean_over_processes
from dinocli.losses.dino import DinoLossConfig
from dinocli.losses.targets import CenteringConfig
from dinocli.schedules import Clock, LinearByEpoch

TEMPERATURE = LinearByEpoch(kind="linear_by_epoch", start=0.04, end=0.07, epochs=5)


def two_calls(rank: int, folder: str) -> None:
    """A process of two: both calls of the stored run, compared with what the original held in this rank."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    original = Original("dino_fixtures_ci")
    made = original.made["loss2rank"]
    targets = CenteringConfig(kind="centering", momentum=0.9, temperature=TEMPERATURE)
    loss_of = DinoLossConfig(weight=1.0, head="dino", student_temperature=0.1, targets=targets)
    for dtype in TOLERANCE:
        loss = loss_of.build(made["out_dim"]).to(dtype)
        for call, epoch in enumerate(made["epochs"]):
            name = f"loss2rank/rank{rank}"
            student = original[f"{name}/student{call}"].to(dtype).unflatten(0, (made["ncrops"], -1))
            teacher = original[f"{name}/teacher{call}"].to(dtype).unflatten(0, (2, -1))
            assert_original(loss(student, loss.aim(teacher, Clock(1, 10, epoch))), original[f"{name}/loss{call}"])
            loss.after_step()
            assert_original(loss.targets.center, original[f"{name}/center_after{call}"][0])
    (Path(folder) / f"done{rank}").touch()
    distributed.destroy_process_group()


def test_two_processes_share_one_center_which_is_the_originals(tmp_path: Path) -> None:
    multiprocessing.spawn(two_calls, (str(tmp_path),), nprocs=2)
    assert (tmp_path / "done0").exists()
    assert (tmp_path / "done1").exists()


def test_alone_the_mean_is_what_one_has() -> None:
    values = torch.randn(3)
    assert mean_over_processes(values) is values
