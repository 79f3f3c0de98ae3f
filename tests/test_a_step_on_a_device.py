"""Waits and copies of a step on a device that runs beside the host, counted without such a device.

On the meta device a step runs as a whole, backward pass included, and what the host keeps for itself is real: numbers
of masked patches, schedules. Where a GPU would make the host wait, meta tensors raise an error or cross devices here.
Fake tensors on `cuda` take the branches of that device, autocast too, but torch's backward pass needs its driver.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROTARY, build_method
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dinocli.data.loader.batch import Batch
from dinocli.data.views.augment import augment
from dinocli.data.views.crops import NUMBERS, draws
from dinocli.data.views.masking import PatchMasks
from dinocli.engine.method import Method
from dinocli.engine.scaling import LossScale
from dinocli.engine.schedules import Clock
from dinocli.engine.trainer import Trainer
from dinocli.method.preset import Preset, load_preset
from dinocli.train.teacher_cache import TeacherCache

META = torch.device("meta")
IMAGES, SIZE, PATCH = 4, 48, 8
HEAD = ("prototypes=64", "hidden=32", "bottleneck=16")
SMALL = [
    f"backbone.options={{img_size={SIZE},patch_size={PATCH},embed_dim=32,depth=2,num_heads=2}}",
    "views.locals=2",
    *(f"heads.dino.{key}" for key in HEAD),
]
SIZES = [f"views.global_{i}.size={SIZE}" for i in (1, 2)] + [f"views.local.size={SIZE // 2}"]
MASKED = [*SMALL, *(f"heads.ibot.{key}" for key in HEAD)]


@dataclass(frozen=True)
class Recipe:
    """Recipe of a small network: a preset with changes, and how the trainer runs it."""

    preset: str
    changes: list[str]
    accumulate: int = 1
    recompute: bool = False
    scaled: bool = False

    def load(self) -> Preset:
        return load_preset(self.preset, self.changes)


RECIPES = {
    "dino": Recipe("tiny-dino", SMALL),
    "dino, convolutional stem": Recipe("tiny", SMALL),
    "dino, in parts": Recipe("tiny-dino", SMALL, accumulate=2, recompute=True),
    "dino, scaled": Recipe("tiny-dino", SMALL, scaled=True),
    "dino, batch norm": Recipe("tiny-dino", [*SMALL, "heads.dino.batch_norm=true"]),
    "dino, no local crops": Recipe("tiny-dino", [*SMALL, "views.locals=0", "views.local=none"]),
    "dino, rotary": Recipe("tiny-dino", [*SMALL[1:], *ROTARY]),
    "dinov2": Recipe("tiny-dinov2", MASKED),
    "dinov2, in parts": Recipe("tiny-dinov2", MASKED, accumulate=2, recompute=True),
    "ibot, visible": Recipe("tiny-dinov2", [*MASKED, "losses.ibot.visible=1.0"]),
    "gram": Recipe("tiny-dinov2", [*MASKED, "losses.gram={weight=1.0, scale=2, class_tokens=0.5}"]),
    "drop path of a subset": Recipe(
        "tiny-dinov2", [*MASKED, "backbone.drop_path=0.3", "backbone.drop_path_rule=uniform"]
    ),
    "distilled": Recipe("tiny-dino", [*SMALL, "teacher.frozen=true"]),
    "distilled features": Recipe(
        "distill-features",
        [SMALL[0], f"views.global_1.size={SIZE}", "losses.features.adaptor={kind='mlp', hidden=12, layers=2}"],
        accumulate=2,
    ),
    "simdino": Recipe("tiny-simdino", [*SMALL[:2], *(f"heads.features.{key}" for key in HEAD[1:])]),
    "simdino, patches": Recipe(
        "simdinov2-vitb16", [SMALL[0], SMALL[1], *SIZES, *(f"heads.shared.{key}" for key in HEAD[1:])]
    ),
    "sigreg": Recipe("tiny-dino", [*SMALL, "losses.sigreg={weight=0.02, slices=16}"]),
    "labels": Recipe(
        "finetune",
        [SMALL[0], SIZES[0], "losses.labels.classes=3", "losses.labels.mixup=0.8", "losses.labels.cutmix=1.0"],
    ),
    "muon": Recipe("tiny-muon", SMALL),
}


def method_of(recipe: Recipe) -> Method:
    """Build the method on the meta device."""
    with META:
        method = build_method(recipe.load(), IMAGES)
        if recipe.recompute:
            method.student.backbone.recompute_blocks()
    return method


def batch_of(preset: Preset, device: torch.device) -> Batch:
    """A batch whose numbers are on the device, except for those that the host keeps."""
    views, local = preset.views, preset.views.local if preset.views.locals else None
    crops = torch.zeros(len(views.globals), IMAGES, 3, SIZE, SIZE, device=device)
    small = torch.zeros(views.locals, IMAGES, 3, local.size, local.size, device=device) if local else None
    clean = torch.zeros(len(crops), IMAGES, 3, 2 * SIZE, 2 * SIZE, device=device) if preset.clean_scale else None
    masks = None
    if views.mask:
        where, rows, weights, counts = (getattr(MASKS, name) for name in ("where", "rows", "weights", "counts"))
        masks = PatchMasks(where.to(device), rows.to(device), weights.to(device), counts)
    return Batch(crops, small, torch.arange(IMAGES), masks, clean)


PATCHES = (SIZE // PATCH) ** 2
MASKS = PatchMasks.of(torch.arange(PATCHES) < torch.tensor([[9, 0, 4, 0], [0, 12, 0, 6]])[..., None])


class Crossings(TorchDispatchMode):
    """Operations whose tensors are on two devices, and all operations counted.

    A copy that need not be waited for is none, and neither is a single number of the host, which travels with a kernel.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        self.operations += 1
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
        devices = {t.device.type for t in tensors if t.ndim or t.device.type != "cpu"}
        asynchronous = (kwargs or {}).get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
        # Only towards the device: what the host reads at once has to be there.
        to_host = name in ("_to_copy", "copy_") and tensors[-1].device.type == "cpu"
        if len(devices) > 1 and (to_host or not asynchronous):
            self.found.append(name)
        return result


@pytest.fixture(autouse=True)
def fused_on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow torch's fused optimizers, which a GPU runs, for meta tensors too."""
    module = importlib.import_module("torch.optim.optimizer")
    supported = module._get_fused_kernels_supported_devices
    monkeypatch.setattr(module, "_get_fused_kernels_supported_devices", lambda: [*supported(), "meta"])


def trainer_of(recipe: Recipe, method: Method, **options: Any) -> Trainer:
    preset, device = recipe.load(), next(method.parameters()).device
    clock = Clock(10, preset.training.epochs, step=10 * preset.training.epochs // 2)  # nothing is frozen any more
    scale = LossScale(device) if recipe.scaled else None
    options |= {"batch_size": IMAGES, "accumulate": recipe.accumulate, "seed": 0, "guarded": True, "scale": scale}
    return Trainer(method, preset.optimizer, clock, **options)


@pytest.mark.parametrize("name", RECIPES)
def test_a_step_that_is_not_logged_never_waits_for_the_device(name: str) -> None:
    recipe = RECIPES[name]
    trainer, batch = trainer_of(recipe, method_of(recipe)), batch_of(recipe.load(), META)
    trainer.step(batch)
    with Crossings() as crossings:
        trainer.step(batch)
    assert not crossings.found
    assert crossings.operations > 500


def backward_without_a_driver(method: Method) -> Callable[..., None]:
    def backward(loss: Tensor) -> None:
        assert loss.shape == () and loss.requires_grad
        for p in method.parameters():
            if p.requires_grad:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad + 1

    return backward


# Not those with masks in parts or with visible patches: the host's own numbers would be fake too, and cannot be read. Nor
# those that send numbers of the host in each step: fake tensors know no pinned memory.
ON_CUDA = (
    *("dino, in parts", "dino, scaled", "dino, rotary", "gram", "drop path of a subset", "distilled features"),
    *("simdino", "muon"),
)


@pytest.mark.parametrize("name", ON_CUDA)
def test_a_step_runs_on_fake_cuda_tensors_with_autocast(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Without a driver torch switches autocast off, and warns.
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    recipe, cuda = RECIPES[name], torch.device("cuda", 0)
    method = method_of(recipe)
    monkeypatch.setattr(Tensor, "backward", backward_without_a_driver(method))
    with FakeTensorMode(allow_non_fake_inputs=True):
        trainer = trainer_of(recipe, method.to_empty(device=cuda), precision=torch.autocast("cuda", torch.float16))
        batch = batch_of(recipe.load(), cuda)
        trainer.step(batch)
        with Crossings() as crossings:
            values = trainer.step(batch)
    assert not crossings.found
    assert all(value.device == cuda and value.dtype == torch.float32 for value in values.values())


def test_views_are_made_without_waiting() -> None:
    views = load_preset("vits16").views
    crops = torch.empty(len(views.all), 2, 32, 32, 3, dtype=torch.uint8, device=META)
    drawn = draws(np.random.default_rng(0).random((2, len(views.all), NUMBERS)), views.all)
    mean, std = (torch.empty(3, device=META) for _ in range(2))
    with Crossings() as crossings:
        made = augment(crops, drawn, mean, std)
    assert made.shape == (len(views.all), 2, 3, 32, 32)
    assert not crossings.found


def test_stored_features_of_teachers_are_copied_without_waiting() -> None:
    cache = TeacherCache([(np.zeros((6, 1, 4, 8), np.float16), np.zeros((6, 1, 8), np.float16))], {}, META)
    with Crossings() as crossings:
        (target,) = cache(torch.tensor([0, 3]))
    assert target.patches.shape == (1, 2, 4, 8)
    assert not crossings.found


@pytest.mark.parametrize("wait", [lambda x: x.sum().item(), lambda x: x.nonzero(), lambda x: bool((x > 0).all())])
def test_meta_tensors_raise_an_error_where_a_device_is_read(wait: Callable[[Tensor], Any]) -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        wait(torch.empty(3, device=META))


@pytest.mark.parametrize(
    ("cross", "found"),
    [
        (lambda x, y: y.to(META), ["_to_copy"]),
        (lambda x, y: y.to(META, non_blocking=True), []),
        (lambda x, y: x.copy_(y), ["copy_"]),
        (lambda x, y: x.copy_(y, non_blocking=True), []),
        (lambda x, y: x * y[0], []),
    ],
)
def test_copies_that_are_waited_for_are_found(cross: Callable[[Tensor, Tensor], Any], found: list[str]) -> None:
    with Crossings() as crossings:
        cross(torch.empty(3, device=META), torch.ones(3))
    assert crossings.found == found


# Versions of blocks for the recipes with others than the paper's, which test_cost_of_a_step.py counts. The student's
# two resolutions, and the teacher's global crops; the last block computes only class tokens where no patch is read.
VERSIONS = {
    "gram": 4,
    "distilled": 4,
    "distilled features": 2,
    "dinov2": 3,
    "ibot, visible": 3,
    "drop path of a subset": 4,
    "simdino": 4,
    "simdino, patches": 4,
    "sigreg": 4,
    "labels": 2,
}


@pytest.mark.parametrize("name", VERSIONS)
def test_blocks_of_each_recipe_are_compiled_without_a_break_and_once(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_: Callable[..., Any] = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module, **given: compile_(module, backend="eager", **given))
    torch._dynamo.reset()
    counters.clear()
    recipe = RECIPES[name]
    trainer, batch = trainer_of(recipe, method_of(recipe)), batch_of(recipe.load(), META)
    for network in trainer.method.networks:
        network.compile_blocks()
    trainer.step(batch)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == VERSIONS[name]
    trainer.step(batch)
    assert counters["stats"]["unique_graphs"] == VERSIONS[name], "nothing is compiled anew at a second step"
    torch._dynamo.reset()
