"""CUDA graphs without CUDA: a stand-in records the operators of a captured step and replays them on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import build_method
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from dinocli.data.loader.batch import Batch
from dinocli.data.views.masking import PatchMasks, deal
from dinocli.engine import graph
from dinocli.engine.graph import GraphTrainer
from dinocli.engine.method import Method, ParamGroup
from dinocli.engine.optim import AdamWConfig, LARSConfig, MuonConfig, OptimizerConfig, SGDConfig
from dinocli.engine.schedules import Clock, Constant, Cosine
from dinocli.engine.trainer import Trainer
from dinocli.method.preset import Preset, load_preset

IMAGES, SIZE, PATCH = 4, 16, 8


class Recording:
    """Stand-in for `torch.cuda.CUDAGraph`: operators with their arguments, which replaying runs anew."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.replays = 0

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            returns = func._schema.returns
            pairs = zip(_as_list(result), _as_list(again), strict=True)
            for about, (old, new) in zip(returns, pairs, strict=False):
                if about.alias_info is None:
                    for own, value in zip(tree_leaves(old), tree_leaves(new), strict=True):
                        if isinstance(own, Tensor):
                            own.view(value.shape).copy_(value)  # whose dimensions `squeeze_` may have removed


def _as_list(result: Any) -> list[Any]:
    return list(result) if isinstance(result, tuple) else [result]


class Recorder(TorchDispatchMode):
    """Recorder of the operators below autograd. It keeps a copy of each tensor from outside, as it was at first."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.recording = recording
        self.inside: set[int] = set()
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.name in ("aten::_local_scalar_dense", "aten::nonzero"):
            raise RuntimeError("operation not permitted when stream is capturing")
        # Not only what the schema says is changed: it omits the statistics of BatchNorm.
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()._cdata
                if storage not in self.inside and storage not in self.before:
                    whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
                    self.before[storage] = whole, whole.clone()
        result = func(*args, **kwargs)
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = (t for t in tree_leaves(result) if isinstance(t, Tensor))
        self.inside |= {t.untyped_storage()._cdata for t in made} - known
        self.recording.calls.append((func, args, kwargs, result))
        return result


@contextmanager
def capture(recording: Recording, **options: Any) -> Iterator[None]:
    """Stand-in for `torch.cuda.graph`: record, and then undo what the operators did, because a capture runs nothing."""
    state = torch.get_rng_state()
    try:
        with Recorder(recording) as recorder:
            yield
    except RuntimeError:
        raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904 (as CUDA does)
    finally:
        for tensor, old in recorder.before.values():
            tensor.copy_(old)
        torch.set_rng_state(state)


class Stream:
    """Stand-in for `torch.cuda.Stream`."""

    def wait_stream(self, other: Stream) -> None:
        pass


@pytest.fixture(autouse=True)
def stand_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "gpu" in request.keywords:
        return
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recording)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())


class Line(Method):
    """Method that fits a line with dropout, and counts its steps in a buffer. Its second parameter is frozen at first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.slope, self.shift = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(2))
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, part: Tensor) -> dict[str, Tensor]:
        x, y = part.split([3, 2], 1)
        return {"near": (torch.dropout(x, 0.25, True) @ self.slope + self.shift - y).square().mean()}

    def metrics(self, parts: Any, losses: Any, clock: Clock) -> dict[str, Tensor | float]:
        return {"momentum": clock.value(MOMENTUM)}

    def param_groups(self) -> list[ParamGroup]:
        return [
            ParamGroup([self.slope], hidden=[True]),
            ParamGroup([self.shift], decay=False, lr_scale=0.5, frozen_epochs=1),
        ]

    def after_step(self, clock: Clock, done: Tensor) -> None:
        self.steps += 1


MOMENTUM = Cosine(kind="cosine", start=0.9, end=1.0)
RATES = {"lr": Cosine(kind="cosine", start=0.1, end=0.0), "weight_decay": Cosine(kind="cosine", start=0.1, end=0.5)}
OPTIMIZERS: list[OptimizerConfig] = [
    AdamWConfig(kind="adamw", betas=(0.9, 0.999), **RATES),
    SGDConfig(kind="sgd", momentum=0.9, **RATES),
    LARSConfig(kind="lars", momentum=0.9, trust=0.1, **RATES),
    MuonConfig(kind="muon", momentum=0.9, matrix_rate=2, betas=(0.9, 0.999), **RATES),
]


def rows(step: int, count: int = 8) -> Tensor:
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(step))


@pytest.mark.parametrize("config", OPTIMIZERS, ids=lambda c: c.kind)
def test_graphs_take_the_steps_of_plain_training(config: OptimizerConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve steps: the first four frozen, every third one logged, one skipped."""
    monkeypatch.setattr(graph, "_PLAIN_STEPS", 1)
    trainers = [
        kind(Line(), config, Clock(4, 3), batch_size=8, seed=0, guarded=True) for kind in (Trainer, GraphTrainer)
    ]
    for step in range(12):
        batch = rows(step) * (float("nan") if step == 8 else 1)
        plain, graphed = (dict(t.step(batch, log=step % 3 == 0)) for t in trainers)
        assert plain.keys() == graphed.keys()
        for name, value in plain.items():
            assert float(graphed[name]) == pytest.approx(float(value), rel=1e-5, nan_ok=True), (step, name)
    plain, graphed = trainers
    for (name, one), other in zip(plain.method.state_dict().items(), graphed.method.state_dict().values(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6, msg=name)
    assert graphed.skipped.tolist() == plain.skipped.tolist() == [1, 0]
    assert sorted(captured.graph.replays for captured in graphed._graphs.values()) == [1, 1, 1, 5]
    assert [group["lr"] for group in graphed.optimizer.param_groups] == [g["lr"] for g in plain.optimizer.param_groups]


def test_values_on_the_device_are_exact() -> None:
    trainer = GraphTrainer(Line(), OPTIMIZERS[0], Clock(4, 3), batch_size=8, seed=0)
    for step in range(9):
        momentum = trainer.step(rows(step), log=True)["momentum"]
        assert float(momentum) == MOMENTUM.at(Clock(4, 3, step))


def test_training_continues_with_plain_steps_if_a_capture_fails() -> None:
    class Waits(Line):
        def after_step(self, clock: Clock, done: Tensor) -> None:
            self.steps += float(done)  # makes the host wait

    lines: list[str] = []
    plain = Trainer(Line(), OPTIMIZERS[0], Clock(4, 3), batch_size=8, seed=0)
    trainer = GraphTrainer(Waits(), OPTIMIZERS[0], Clock(4, 3), batch_size=8, seed=0, note=lines.append)
    for step in range(8):
        values = [t.step(rows(step)) for t in (plain, trainer)]
        assert float(values[1]["loss"]) == pytest.approx(float(values[0]["loss"]), rel=1e-5)
    (line,) = lines
    assert line == (
        "note: this step cannot be captured as a CUDA graph (operation not permitted when stream is capturing); "
        "training with plain steps"
    )
    torch.testing.assert_close(trainer.method.slope, plain.method.slope, rtol=1e-4, atol=1e-6)
    assert trainer.method.steps.item() == 8


def leaves_the_weights(trainer: GraphTrainer, before: list[Tensor]) -> None:
    for p, old in zip(trained(trainer), before, strict=True):
        p.data.copy_(old)


def goes_backwards(trainer: GraphTrainer, before: list[Tensor]) -> None:
    for p, old in zip(trained(trainer), before, strict=True):
        p.data.copy_(2 * old - p)


def leaves_the_average(trainer: GraphTrainer, before: list[Tensor]) -> None:
    for p, q in zip(trainer.method.average.parameters(), trainer.before_average, strict=True):
        p.data.copy_(q)


def counts_no_step(trainer: GraphTrainer, before: list[Tensor]) -> None:
    for slots in trainer.optimizer.state.values():
        slots["step"] -= 1


def leaves_a_moment(trainer: GraphTrainer, before: list[Tensor]) -> None:
    for slots in trainer.optimizer.state.values():
        slots["exp_avg_sq"] /= 2


def trained(trainer: GraphTrainer) -> list[nn.Parameter]:
    return [p for p in trainer.method.parameters() if p.requires_grad]


FAULTS = {leaves_the_weights: "weights", goes_backwards: "weights", leaves_the_average: "averages"}
FAULTS |= {counts_no_step: "counts", leaves_a_moment: "exp_avg_sq"}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("name", ["dino", "simdino"])
def test_a_graph_that_takes_another_step_is_not_used(name: str, fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    replay, lines = Recording.replay, list[str]()

    def wrongly(recording: Recording) -> None:
        before = [p.detach().clone() for p in trained(trainer)]
        trainer.before_average = [p.detach().clone() for p in trainer.method.average.parameters()]
        replay(recording)
        fault(trainer, before)

    monkeypatch.setattr(Recording, "replay", wrongly)
    trainers: list[Any] = []
    for kind, more in ((Trainer, {}), (GraphTrainer, {"note": lines.append})):
        preset, method = build(name)
        trainers.append(
            kind(method, preset.optimizer, Clock(4, 50, 4), batch_size=IMAGES, seed=0, guarded=True, **more)
        )
    plain, trainer = trainers
    for step in range(6):
        values = [t.step(draw_batch(preset, step)) for t in trainers]
        assert float(values[1]["loss"]) == pytest.approx(float(values[0]["loss"]), rel=1e-6)
    (line,) = lines
    assert line.startswith(f"note: a CUDA graph differs from the plain step ({FAULTS[fault]} "), line
    assert not trainer._graphs
    for p, q in zip(trained(trainer), trained(plain), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_graphs_need_the_memory_of_two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    found = {"mem_get_info": (10, 100), "memory_allocated": 20, "max_memory_allocated": 50, "memory_reserved": 76}
    for name, value in found.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert graph._has_room(cuda)  # 66 are free, a step takes 30
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 51)
    assert not graph._has_room(cuda)
    lines: list[str] = []
    monkeypatch.setattr(graph, "_has_room", lambda device: False)
    trainer = GraphTrainer(Line(), OPTIMIZERS[0], Clock(4, 3), batch_size=8, seed=0, note=lines.append)
    for step in range(5):
        assert trainer.step(rows(step))["loss"].isfinite()
    assert lines == ["note: the memory is too small for CUDA graphs beside other steps; training with plain steps"]


def test_a_graph_with_another_loss_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    replay, lines = Recording.replay, list[str]()

    def wrongly(recording: Recording) -> None:
        replay(recording)
        for captured in trainer._graphs.values():
            captured.values["loss"] += 1

    monkeypatch.setattr(Recording, "replay", wrongly)
    trainer = GraphTrainer(Line(), OPTIMIZERS[0], Clock(4, 3), batch_size=8, seed=0, note=lines.append)
    for step in range(5):
        trainer.step(rows(step))
    (line,) = lines
    assert "(loss " in line and line.endswith("training with plain steps")


@pytest.mark.parametrize("logged", [True, False], ids=["another form", "the check of a graph"])
def test_graphs_are_freed_if_a_plain_step_needs_their_memory(logged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Large(Line):
        def forward(self, part: Tensor) -> dict[str, Tensor]:
            self.steps += 10  # as BatchNorm changes its statistics in a forward pass
            if trainer._graphs and (logging or not logged) and not torch._C._len_torch_dispatch_stack():
                raise torch.OutOfMemoryError
            return super().forward(part)

    lines: list[str] = []
    plain = Trainer(Line(), OPTIMIZERS[0], Clock(4, 3), batch_size=8, seed=0)
    trainer = GraphTrainer(Large(), OPTIMIZERS[0], Clock(4, 3), batch_size=8, seed=0, note=lines.append)
    for step in range(8):
        logging = step == 6
        values = [t.step(rows(step), log=logging) for t in (plain, trainer)]
        assert float(values[1]["loss"]) == pytest.approx(float(values[0]["loss"]), rel=1e-5)
    assert lines == ["note: the memory is too small for CUDA graphs beside other steps; training with plain steps"]
    torch.testing.assert_close(trainer.method.slope, plain.method.slope, rtol=1e-4, atol=1e-6)
    assert trainer.method.steps.item() == 8 * 11


def test_the_number_of_graphs_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "_PLAIN_STEPS", 1)
    monkeypatch.setattr(graph, "_MOST_GRAPHS", 2)
    trainer = GraphTrainer(Line(), OPTIMIZERS[0], Clock(100, 3), batch_size=8, seed=0)
    for step in range(12):
        assert trainer.step(rows(step, 5 + step % 4))["loss"].isfinite()
    assert [captured.graph.replays for captured in trainer._graphs.values()] == [2, 2]
    assert [len(batch) for batch in trainer._batches.values()] == [5, 6]


class Operators(TorchDispatchMode):
    """Operators with all their arguments that are no tensors, and the shapes of those that are."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = tree_map(lambda x: (x.shape, x.dtype) if isinstance(x, Tensor) else x, (args, kwargs))
        if func.namespace == "aten":
            self.found.append(f"{func._schema.name} {plain}")
        return func(*args, **(kwargs or {}))


SMALL = [
    f"backbone.options={{img_size={SIZE},patch_size={PATCH},embed_dim=16,depth=1,num_heads=2}}",
    "backbone.drop_path=0.1",
    "optimizer.lr.warmup_epochs=0",
]
HEAD = ("prototypes=32", "hidden=16", "bottleneck=8")
VIEWS = [f"views.global_{i}.size={SIZE}" for i in (1, 2)] + [f"views.local.size={PATCH}", "views.locals=2"]
RAMP = "{kind='cosine', start=1.0, end=2.0}"
RECIPES = {
    "dino": ("tiny-dino", [*SMALL, *VIEWS, *(f"heads.dino.{key}" for key in HEAD)]),
    "dinov2": (
        "tiny-dinov2",
        [
            *SMALL,
            *VIEWS,
            *(f"heads.{name}.{key}" for name in ("dino", "ibot") for key in HEAD),
            "losses.ibot.visible=0.5",
            f"losses.gram={{weight={RAMP}, first_update=2}}",
        ],
    ),
    "simdino": (
        "tiny-simdino",
        [*SMALL, *VIEWS, *(f"heads.features.{key}" for key in HEAD[1:]), "losses.sigreg={weight=0.02, slices=16}"],
    ),
    "features": ("distill-features", [*SMALL, VIEWS[0], "losses.features.adaptor={kind='mlp', hidden=12, layers=2}"]),
    "labels": ("finetune", [*SMALL, VIEWS[0], "losses.labels.classes=3", "losses.labels.mixup=1.0"]),
}


def build(name: str) -> tuple[Preset, Method]:
    """Build a method in float64, because Adam scales rounding up wherever a gradient is nearly 0."""
    preset = load_preset(RECIPES[name][0], RECIPES[name][1])
    torch.manual_seed(0)
    return preset, build_method(preset, 8).double()


def draw_batch(preset: Preset, number: int) -> Batch:
    generator, views = torch.Generator().manual_seed(number), preset.views
    options = {"generator": generator, "dtype": torch.float64}
    crops = torch.randn(len(views.globals), IMAGES, 3, SIZE, SIZE, **options)
    local = torch.randn(views.locals, IMAGES, 3, PATCH, PATCH, **options) if views.locals else None
    masks = None
    if views.mask:
        patches = (SIZE // PATCH) ** 2
        counts = deal(views.mask, (len(views.globals), IMAGES), patches, seed=0, batch=number, rank=0)
        places = torch.from_numpy(
            np.random.default_rng(number).permuted(np.tile(np.arange(patches), (2, IMAGES, 1)), axis=-1)
        )
        masks = PatchMasks.of(places < counts[..., None])
    return Batch(
        crops, local, torch.randperm(8, generator=generator)[:IMAGES], masks, crops if preset.clean_scale else None
    )


class Watching:
    """Addition to a trainer that records the operators of a step."""

    def _run(self, batch: Any, clock: Clock, *, log: bool) -> Any:
        with Operators() as self.operators:
            return super()._run(batch, clock, log=log)  # type: ignore[misc]


class WatchedGraphs(Watching, GraphTrainer):
    pass


class WatchedSteps(Watching, Trainer):
    pass


@pytest.mark.parametrize("name", RECIPES)
def test_a_step_reads_no_number_of_the_host_that_changes(name: str) -> None:
    """Step 3 and step 500 run the same operators with the same arguments; those of plain steps have other rates."""
    found = {}
    for kind in (WatchedGraphs, WatchedSteps):
        preset, method = build(name)
        trainer = kind(method, preset.optimizer, Clock(1, 1000, 2), batch_size=IMAGES, seed=0, guarded=True)
        trainer.step(draw_batch(preset, 0), log=True)
        for step in (3, 500):
            trainer.clock = replace(trainer.clock, step=step)
            trainer.step(draw_batch(preset, step), log=True)
            found[kind, step] = trainer.operators.found
    assert len(found[WatchedGraphs, 3]) > 300
    assert found[WatchedGraphs, 3] == found[WatchedGraphs, 500]
    assert found[WatchedSteps, 3] != found[WatchedSteps, 500]


@pytest.mark.parametrize("name", RECIPES)
def test_graphs_of_each_method_take_the_steps_of_plain_training(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "_PLAIN_STEPS", 1)
    trainers = []
    for kind in (Trainer, GraphTrainer):
        preset, method = build(name)
        trainers.append(kind(method, preset.optimizer, Clock(4, 50), batch_size=IMAGES, seed=0, guarded=True))
    for step in range(10):
        plain, graphed = (dict(t.step(draw_batch(preset, step), log=step % 3 == 0)) for t in trainers)
        for key, value in plain.items():
            assert float(graphed[key]) == pytest.approx(float(value), rel=1e-6, abs=1e-7, nan_ok=True), (step, key)
    assert sum(captured.graph.replays for captured in trainers[1]._graphs.values()) >= 4
    plain, graphed = (t.method.state_dict() for t in trainers)
    for key, value in plain.items():
        # Biases of keys have no gradient but rounding.
        if not key.endswith("qkv.bias"):
            torch.testing.assert_close(graphed[key], value, rtol=1e-6, atol=1e-7, msg=key)


def on_gpu(batch: Batch, dtype: torch.dtype) -> Batch:
    """Copy a batch to the GPU, apart from what the host keeps."""
    masks, clean = batch.masks, batch.clean_crops
    if masks:
        masks = PatchMasks(masks.where.cuda(), masks.rows.cuda(), masks.weights.cuda(), masks.counts)
    crops, local, clean = (
        None if t is None else t.to("cuda", dtype) for t in (batch.global_crops, batch.local_crops, clean)
    )
    assert crops is not None
    return Batch(crops, local, batch.rows, masks, clean)


@pytest.mark.gpu
@pytest.mark.parametrize("name", RECIPES)
def test_cuda_graphs_take_the_steps_of_plain_training(name: str) -> None:
    """On a GPU: the same draws, so the same losses up to rounding, by torch's update in float64 and by Triton's."""
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 1e-2)):
        lines: list[str] = []
        trainers: list[Any] = []
        for kind, more in ((Trainer, {}), (GraphTrainer, {"note": lines.append})):
            preset, method = build(name)
            method = method.to("cuda", dtype)
            trainers.append(
                kind(method, preset.optimizer, Clock(4, 50), batch_size=IMAGES, seed=0, guarded=True, **more)
            )
        for step in range(20):
            batch = on_gpu(draw_batch(preset, step), dtype)
            plain, graphed = (t.step(batch, log=step % 3 == 0)["loss"].item() for t in trainers)
            assert graphed == pytest.approx(plain, rel=tolerance), (dtype, step)
        assert not lines
        assert (trainers[1].fused is None) == (dtype == torch.float64)
        assert len(trainers[1]._graphs) >= 2


@pytest.mark.gpu
def test_a_failed_capture_leaves_the_stream_and_says_why() -> None:
    class Waits(Line):
        def after_step(self, clock: Clock, done: Tensor) -> None:
            self.steps += float(done)

    lines: list[str] = []
    main = torch.cuda.current_stream()
    trainer = GraphTrainer(Waits().cuda(), OPTIMIZERS[0], Clock(4, 3), batch_size=8, seed=0, note=lines.append)
    for step in range(6):
        assert trainer.step(rows(step).cuda())["loss"].isfinite()
    assert torch.cuda.current_stream() == main
    (line,) = lines
    assert "cannot be captured" in line and "previous error" not in line
    assert trainer.method.steps.item() == 6


def test_a_constant_needs_no_place_of_its_own_for_each_step() -> None:
    numbers, flat = graph.Numbers(torch.device("cpu")), Constant(kind="constant", value=0.3)
    places = {numbers.of(flat, Clock(4, 3, step)).data_ptr() for step in range(5)}
    assert len(places) == 1
