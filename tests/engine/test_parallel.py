from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from conftest import together
from numpy.typing import NDArray
from torch import Tensor, nn

from dinocli.core.distributed import rank, size
from dinocli.core.errors import DinoError
from dinocli.data.loader.batch import Batch
from dinocli.data.views.masking import PatchMasks
from dinocli.engine.checkpoint import restore, state_of
from dinocli.engine.method import Method, ParamGroup
from dinocli.engine.optim import SGDConfig
from dinocli.engine.parallel import Alone, Kind, SharedBatchNorm, parallel, share_batch_norm
from dinocli.engine.schedules import Clock, Constant
from dinocli.engine.trainer import Trainer
from dinocli.method.preset import load_preset

Arrays = dict[str, NDArray[np.float32]]


SHAPES = {"vectors": (12, 5), "maps": (12, 3, 4, 2)}


def run_batch_norms() -> dict[str, Arrays]:
    """Run a BatchNorm for each kind of input on this process's share of a batch."""
    return {kind: _run_batch_norm(shape) for kind, shape in SHAPES.items()}


def _run_batch_norm(shape: tuple[int, ...]) -> Arrays:
    """Return a BatchNorm's output for this process's share of a batch, passed twice, its gradients and statistics."""
    generator = torch.Generator().manual_seed(0)
    whole = 3 + 2 * torch.randn(*shape, generator=generator)
    mine = slice(rank() * shape[0] // size(), (rank() + 1) * shape[0] // size())
    kind = nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d
    net = nn.Sequential(kind(shape[1], momentum=0.3))
    net[0].weight.data, net[0].bias.data = torch.linspace(0.5, 2, shape[1]), torch.linspace(-1, 1, shape[1])
    loss_weights = torch.linspace(-1, 2, whole.numel()).view(shape).sin()
    if size() > 1:
        keys = list(net.state_dict())
        share_batch_norm(net)
        assert isinstance(net[0], SharedBatchNorm)
        assert list(net.state_dict()) == keys
    inputs = whole[mine].clone().requires_grad_()
    for _ in range(2):
        output = net(inputs)
    (output * loss_weights[mine]).square().sum().backward()
    results = {"output": output, "input grad": inputs.grad, "weight": net[0].weight.grad, "bias": net[0].bias.grad}
    results |= {"eval output": net.eval()(inputs)} | dict(net.named_buffers())
    return {name: value.detach().double().numpy() for name, value in results.items()}


def test_a_shared_batch_norm_of_low_precision_keeps_statistics_in_float32() -> None:
    torch.manual_seed(0)
    values = (torch.randn(6, 4, 3, 3) * 3 + 5).bfloat16()
    theirs = torch.nn.BatchNorm2d(4)
    ours = SharedBatchNorm.of(copy.deepcopy(theirs))
    expected, found = theirs(values.float()), ours(values)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(ours.running_var, theirs.running_var)


@pytest.mark.parametrize("count", [2, 3])
def test_a_shared_batch_norm_equals_one_over_the_whole_batch(count: int) -> None:
    whole, shares = run_batch_norms(), together(count, run_batch_norms)
    for kind, name in [(kind, name) for kind, results in whole.items() for name in results]:
        each = [share[kind][name] for share in shares]
        if name in ("output", "input grad", "eval output"):
            combined = np.concatenate(each)
        else:  # gradients are sums over images; statistics are the same in every process
            combined = sum(each) if name in ("weight", "bias") else each[-1]
        np.testing.assert_allclose(combined, whole[kind][name], rtol=2e-5, atol=2e-5, err_msg=f"{kind}: {name}")


def test_a_single_process_uses_no_parallelism() -> None:
    assert parallel("ddp") == parallel("fsdp") == Alone()


def test_batch_norms_of_unknown_kinds_are_refused() -> None:
    from timm.layers import BatchNormAct2d

    with pytest.raises(DinoError, match="BatchNormAct2d of this backbone"):
        share_batch_norm(nn.Sequential(BatchNormAct2d(3)))


SMALL = [
    "backbone.options={img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2}",
    "heads.dino.prototypes=16", "heads.dino.hidden=16", "heads.dino.bottleneck=8", "optimizer.lr.warmup_epochs=0",
    "optimizer.clip={kind='each_parameter', norm=0.05}",
]  # fmt: skip
KINDS = {
    "adamw": ["optimizer.lr.start=0.1"],
    "sgd": ["optimizer.kind=sgd", "optimizer.betas=none", "optimizer.momentum=0.9", "optimizer.lr.start=2"],
}
KINDS["lars"] = [*KINDS["sgd"][1:], "optimizer.kind=lars", "optimizer.trust=0.1"]
LoggedSteps = list[dict[str, float]]


def steps(
    kind: Kind,
    overrides: list[str],
    accumulate: int = 1,
    first: int = 0,
    last: int = 6,
    state: Arrays | None = None,
    name: str = "tiny-dino",
) -> tuple[LoggedSteps, Arrays]:
    """Train some steps, and return their metrics and the trainer's state; the fourth step has a NaN in one image."""
    preset = load_preset(name, [*SMALL, *overrides])
    torch.manual_seed(0)
    trainer = Trainer(
        preset.method(), preset.optimizer, Clock(2, 10, first), batch_size=8, accumulate=accumulate, seed=0,
        guarded=True, parallel=parallel(kind),
    )  # fmt: skip
    if state:
        restore(trainer, {name: torch.from_numpy(value) for name, value in state.items()})
    generator, logged = torch.Generator().manual_seed(1), []
    mine = slice(rank() * 8 // size(), (rank() + 1) * 8 // size())
    for step in range(last):
        crops, small = (torch.randn(v, 8, 3, s, s, generator=generator) for v, s in ((2, 16), (3, 8)))
        if step == 3:
            small[0, 0] = torch.nan
        masks = draw_masks(step).split(size())[rank()] if preset.views.mask else None
        clean = torch.randn(2, 8, 3, 32, 32, generator=generator)[:, mine] if preset.losses.gram else None
        if step >= first:
            values = trainer.step(Batch(crops[:, mine], small[:, mine], torch.arange(8)[mine], masks, clean), log=True)
            logged.append({name: float(value) for name, value in values.items()})
    return logged, {name: value.detach().numpy().copy() for name, value in state_of(trainer).items()}


def draw_masks(step: int) -> PatchMasks:
    """Return masks of eight images, whose two halves differ in the numbers of masked crops and masked patches."""
    where = torch.zeros(2, 8, 4, dtype=torch.bool)
    for view, image, count in ((0, 0, 1), (1, 2, 2), (0, 5, 3), (1, 6, 2), (1, 7, 3)):
        where[view, image, : (count + step) % 4 + 1] = True
    masks = PatchMasks.of(where)
    first, second = masks.split(2)
    assert (first.counts > 0).sum() != (second.counts > 0).sum()
    return masks


# The gradient of a bias before a BatchNorm is 0 except for rounding, because the BatchNorm subtracts the bias again.
IDLE = ("mlp.0.bias", "mlp.3.bias")


def without_keys(bias: NDArray[np.float32]) -> NDArray[np.float32]:
    """Remove the keys' part of a bias: its gradient is 0 too, because it shifts all scores of a query equally."""
    queries, _, values = np.split(bias, 3)
    return np.concatenate([queries, values])


def assert_same(one: tuple[LoggedSteps, Arrays], other: tuple[LoggedSteps, Arrays]) -> None:
    normed = any("mlp.1.running_mean" in name for name in one[1])
    for step, (a, b) in enumerate(zip(one[0], other[0], strict=True)):
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=5e-5, abs=1e-5, nan_ok=True), (step, name)
    assert one[1].keys() == other[1].keys()
    for name, value in one[1].items():
        atol = 1e-3 if normed and any(idle in name for idle in IDLE) else 1e-5
        actual, expected = (
            without_keys(array) if name.endswith("qkv.bias") else array for array in (other[1][name], value)
        )
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=atol, err_msg=name)


# BatchNorm only with SGD and LARS: AdamW scales a gradient of mere rounding up like any other.
@pytest.mark.parametrize(
    ("kind", "optimizer", "batch_norm", "accumulate"),
    [
        ("ddp", "adamw", "false", 2),
        ("ddp", "sgd", "true", 1),
        ("fsdp", "adamw", "false", 2),
        ("fsdp", "lars", "true", 1),
    ],
)
def test_two_processes_train_the_same_as_one(kind: Kind, optimizer: str, batch_norm: str, accumulate: int) -> None:
    overrides = [*KINDS[optimizer], f"heads.dino.batch_norm={batch_norm}"]
    alone = steps(kind, overrides, accumulate)
    assert np.isnan(alone[0][3]["loss"])
    assert alone[1]["skipped"].tolist() == [1, 0]
    start = steps(kind, overrides, accumulate, last=0)[1]
    key = "method/student.backbone.model.blocks.1.mlp.fc1.weight"
    assert np.abs(alone[1][key] - start[key]).max() > 3e-4, "training has changed the weights"
    two = together(2, steps, kind, overrides, accumulate)
    assert_same(alone, two[0])
    assert_same((two[0][0], {}), (two[1][0], {}))
    for name, value in two[0][1].items():
        np.testing.assert_array_equal(two[1][1][name], value, err_msg=name)


DINOV2 = [
    "heads.dino.batch_norm=false", "heads.ibot={prototypes=16, hidden=16, bottleneck=8, layers=2, norm_last_layer=true}",
    *KINDS["adamw"],
]  # fmt: skip


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_train_the_same_as_one_with_masked_patches(kind: Kind) -> None:
    """iBOT, Sinkhorn-Knopp and the metrics are computed over all processes, which have different masks."""
    overrides = [*DINOV2, "losses.koleo=none"]
    alone = steps(kind, overrides, name="tiny-dinov2")
    two = together(2, steps, kind, overrides, 1, 0, 6, None, "tiny-dinov2")
    assert_same(alone, two[0])
    assert_same((two[0][0], {}), (two[1][0], {}))
    start = steps(kind, overrides, last=0, name="tiny-dinov2")[1]
    for key in ("mask_token", "heads.ibot.last_layer.weight_v"):
        moved = np.abs(alone[1][f"method/student.{key}"] - start[f"method/student.{key}"]).max()
        assert moved > 3e-4, "training has changed the weights"


GRAM = [*DINOV2, "losses.koleo=none", "losses.ibot.visible=0.5"]
GRAM += ["losses.gram={weight=2.0, first_update=1, update_every=1, scale=2}", "views.global_1.size=16"]
GRAM += ["views.global_2.size=16", "views.local.size=8"]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_anchor_the_same_as_one(kind: Kind) -> None:
    """The Gram teacher is copied in steps 2 and 4, sharded or not; a state of two processes resumes in one."""
    alone = steps(kind, GRAM, 2, name="tiny-dinov2")
    two = together(2, steps, kind, GRAM, 1, 0, 6, None, "tiny-dinov2")
    assert_same(alone, two[0])
    assert [values["gram"] > 0 for values in alone[0]] == [False, False, True, True, True, True]
    half = together(2, steps, kind, GRAM, 1, 0, 3, None, "tiny-dinov2")[0]
    key = "method/gram.backbone.model.norm.weight"
    start = steps(kind, GRAM, last=0, name="tiny-dinov2")[1]
    assert np.abs(half[1][key] - start[key]).max() > 1e-5, "the copy is not the untrained network"
    rest = steps(kind, GRAM, first=3, state=half[1], name="tiny-dinov2")
    assert_same(alone, (half[0] + rest[0], rest[1]))


def test_koleo_of_two_processes_equals_that_of_two_parts() -> None:
    """Neighbours of a class token are from the same process; in a single process, they are from the same part."""
    in_parts = steps("ddp", DINOV2, 2, name="tiny-dinov2")
    assert_same(in_parts, together(2, steps, "ddp", DINOV2, 1, 0, 6, None, "tiny-dinov2")[0])
    whole = steps("ddp", DINOV2, last=1, name="tiny-dinov2")[0][0]
    assert whole["dino"] == pytest.approx(in_parts[0][0]["dino"], rel=1e-5)
    assert whole["ibot"] == pytest.approx(in_parts[0][0]["ibot"], rel=1e-5)
    assert whole["koleo"] > in_parts[0][0]["koleo"] + 1e-3, "among more images the nearest neighbour is nearer"


WHOLE = ["losses.dino=none", "losses.ibot=none", "losses.koleo=none", "heads.ibot=none", *KINDS["lars"]]
WHOLE += ["heads.dino={hidden=16, bottleneck=8, layers=3}", "losses.simdino_patches={weight=1, head='dino'}"]
WHOLE += ["losses.simdino={weight=1, head='dino', eps=0.05, with_teacher=true}", "backbone.drop_path=0.0"]
WHOLE += ["losses.sigreg={weight=0.02, slices=16}"]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_losses_over_the_whole_batch_do_not_depend_on_processes_and_parts(kind: Kind) -> None:
    """SimDINO and SIGReg: the means are those of all parts and processes, and so are the gradients."""
    alone = steps(kind, WHOLE, name="tiny-dinov2")
    assert {"simdino", "simdino_patches", "sigreg", "simdino/expansion"} <= set(alone[0][0])
    assert_same(alone, steps(kind, WHOLE, 2, name="tiny-dinov2"))
    two = together(2, steps, kind, WHOLE, 2, 0, 6, None, "tiny-dinov2")
    assert_same(alone, two[0])
    assert_same((two[0][0], {}), (two[1][0], {}))
    half = together(2, steps, kind, WHOLE, 1, 0, 3, None, "tiny-dinov2")[0]
    rest = steps(kind, WHOLE, 4, first=3, state=half[1], name="tiny-dinov2")
    assert_same(alone, (half[0] + rest[0], rest[1]))


SIGREG = "losses.sigreg={weight=0.02, slices=16}"


@pytest.mark.parametrize(
    ("others", "parts"),
    # KoLeo of two processes equals that of two parts; SIGReg alone does not depend on the parts.
    [([], 2), (["losses.koleo=none"], 1)],
    ids=["beside KoLeo", "instead of KoLeo"],
)
def test_sigreg_of_two_processes_equals_that_of_one(others: list[str], parts: int) -> None:
    overrides = [*DINOV2, SIGREG, *others]
    alone = steps("ddp", overrides, parts, name="tiny-dinov2")
    assert ("koleo" in alone[0][0]) == (not others)
    assert_same(alone, together(2, steps, "ddp", overrides, 1, 0, 6, None, "tiny-dinov2")[0])
    without = steps("ddp", [*DINOV2, *others], parts, name="tiny-dinov2")
    assert "sigreg" not in without[0][0]
    key = "method/student.backbone.model.blocks.1.mlp.fc1.weight"
    assert np.abs(alone[1][key] - without[1][key]).max() > 3e-4, "SIGReg has changed the weights"


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_states_of_two_processes_resume_in_one_and_the_reverse(kind: Kind) -> None:
    overrides = [*KINDS["adamw"], "heads.dino.batch_norm=false"]
    whole = steps(kind, overrides)
    of_two = together(2, steps, kind, overrides, 1, 0, 3)[0]
    in_one = steps(kind, overrides, first=3, state=of_two[1])
    of_one = steps(kind, overrides, last=3)
    in_two = together(2, steps, kind, overrides, 1, 3, 6, of_one[1])[0]
    assert_same(whole, (of_two[0] + in_one[0], in_one[1]))
    assert_same(whole, (of_one[0] + in_two[0], in_two[1]))


class Steep(Method):
    """Method with one parameter, whose loss is infinite in the second process but whose gradient is finite."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.ones(()))

    def forward(self, part: float) -> dict[str, Tensor]:
        return {"near": self.value**2 + (torch.inf if rank() == 1 else 0.0)}

    def param_groups(self) -> list[ParamGroup]:
        return [ParamGroup([self.value])]


def step_with_infinite_loss() -> tuple[float, list[int]]:
    flat = Constant(kind="constant", value=0.1)
    config = SGDConfig(kind="sgd", momentum=0.0, lr=flat, weight_decay=flat)
    trainer = Trainer(Steep(), config, Clock(1, 1), batch_size=2, guarded=True, parallel=parallel("ddp"))
    trainer.step(1.0)
    return trainer.method.value.item(), trainer.skipped.tolist()


def test_all_processes_skip_a_step_that_is_not_finite_in_one() -> None:
    assert step_with_infinite_loss()[1] == [0, 0]
    assert together(2, step_with_infinite_loss) == [(1.0, [1, 1])] * 2
