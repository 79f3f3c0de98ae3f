from __future__ import annotations

import pytest
import torch

from dinocli.engine.checkpoint import restore, state_of
from dinocli.engine.schedules import Clock
from dinocli.engine.trainer import Trainer
from dinocli.method.preset import load_preset

SMALL = [
    "backbone.options={img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2}",
    "backbone.drop_path=0.5",
    "heads.dino.prototypes=16",
    "heads.dino.hidden=16",
    "heads.dino.bottleneck=8",
]


def make_trainer(seed: int, optimizer: str) -> Trainer:
    torch.manual_seed(seed)
    kinds = {"adamw": [], "sgd": ["optimizer.betas=none", "optimizer.momentum=0.9"]}
    kinds["lars"] = [*kinds["sgd"], "optimizer.trust=0.001"]
    kinds["muon"] = ["optimizer.momentum=0.9", "optimizer.matrix_rate=4"]
    preset = load_preset("tiny-dino", [*SMALL, f"optimizer.kind={optimizer}", *kinds[optimizer]])
    return Trainer(preset.method(), preset.optimizer, Clock(2, 10), batch_size=4, seed=3, guarded=True)


def batches(count: int) -> list:
    from dinocli.data.loader.batch import Batch

    generator = torch.Generator().manual_seed(1)
    return [Batch(torch.randn(2, 4, 3, 16, 16, generator=generator), None, torch.arange(4)) for _ in range(count)]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars", "muon"])
def test_a_restored_trainer_resumes_bit_by_bit(optimizer: str) -> None:
    whole, first, second = make_trainer(0, optimizer), make_trainer(0, optimizer), make_trainer(9, optimizer)
    all_batches = batches(6)
    all_batches[1].global_crops[0, 0] = torch.nan
    for batch in all_batches:
        whole.step(batch)
    for batch in all_batches[:3]:
        first.step(batch)
    restore(second, {name: value.clone() for name, value in state_of(first).items()})
    second.clock = first.clock
    torch.manual_seed(77)  # torch's own random state does not matter
    for batch in all_batches[3:]:
        second.step(batch)
    ends = state_of(whole), state_of(second)
    assert ends[0].keys() == ends[1].keys()
    assert {"method/student.heads.dino.mlp.1.running_mean", "method/losses.dino.targets.center", "skipped"} <= ends[
        0
    ].keys()
    assert sum(name.startswith("optimizer/") for name in ends[0]) > 20
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    assert ends[0]["skipped"].tolist() == [1, 0]


def test_states_with_missing_or_unknown_tensors_are_refused() -> None:
    one = make_trainer(0, "adamw")
    state = state_of(one)
    with pytest.raises(RuntimeError, match="Missing key"):
        restore(one, {k: v for k, v in state.items() if "cls_token" not in k})
    with pytest.raises(KeyError):
        restore(one, state | {"optimizer/student.no_such/exp_avg": torch.zeros(1)})
