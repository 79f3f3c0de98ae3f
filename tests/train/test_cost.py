from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import peak_of, write_images

from dinocli.core import device
from dinocli.core.device import autocast
from dinocli.core.errors import DinoError
from dinocli.data.loader.batch import Batch
from dinocli.data.sources.open import image_folder
from dinocli.engine.trainer import Trainer
from dinocli.method.preset import Preset, load_preset
from dinocli.models.network import Network
from dinocli.train.cost import Estimate, estimate, to_fit
from dinocli.train.plan import Plan

CPU = torch.device("cpu")
# A small network in which activations take more memory than weights.
SMALL = ("backbone.options={depth=3,embed_dim=64,num_heads=2,img_size=64,patch_size=8}", "heads.dino.prototypes=512")


def plan(images: Path, *overrides: str, preset: str = "tiny-dino", stop: int = 10, recompute: bool = False) -> Plan:
    made = load_preset(preset, overrides)
    return Plan(preset, made, image_folder(images), stop, Path("run"), CPU, 0, None, recompute=recompute)


@pytest.mark.slow
def test_counts_of_the_papers_network(images: Path) -> None:
    cost = estimate(plan(images, "views.locals=8", "training.batch_size=8", preset="vits16"))
    assert cost.backbone_parameters == 21_665_664
    # By hand: student and teacher on 2x224 and 8x96 pixels, with a backward pass of two forward passes, take 113.4 GFLOP.
    # Without the last block's work on tokens that no loss reads, 105.7.
    assert cost.flops / 1e9 == pytest.approx(105.7, rel=0.002)
    assert cost.seconds > 0
    assert 1e9 < cost.memory < 10e9


def test_the_estimate_grows_with_the_length_of_the_run(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "x", 40)
    small, large = (estimate(plan(folder, f"training.batch_size={b}", stop=5)) for b in (4, 32))
    assert large.memory > small.memory
    assert large.flops == small.flops
    parts = estimate(replace(plan(folder, "training.batch_size=32", stop=5), accumulate=8))
    assert parts.memory == small.memory + 28 * small.waiting, "of 32 images in 8 parts, 4 are computed and 28 wait"


def peak_of_a_step(plan: Plan) -> float:
    """Return the peak memory of a real step above the memory before it, in bytes."""
    torch.manual_seed(0)
    training, views = plan.preset.training, plan.preset.views
    precision = autocast(CPU, training.precision)
    trainer = Trainer(
        plan.method(), plan.preset.optimizer, plan.clock, batch_size=training.batch_size, precision=precision
    )
    sizes = [(2, views.global_1.size)] + ([(views.locals, views.local.size)] if views.local else [])
    made = [torch.randn(n, training.batch_size, 3, side, side) for n, side in sizes]
    batch = Batch(made[0], made[1] if len(made) > 1 else None, torch.arange(training.batch_size))
    trainer.step(batch)
    return peak_of(lambda: trainer.step(batch))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_step_takes_the_estimated_flops_and_memory(images: Path, precision: str, recompute: bool) -> None:
    made = plan(images, *SMALL, "training.batch_size=8", f"training.precision={precision}", recompute=recompute)
    cost = estimate(made)
    crops = 3 * 4 * 8 * (2 * 48**2 + 4 * 24**2)  # exist before the step
    before = 4 * 4 * cost.parameters + crops  # student, teacher and two moments in float32
    assert peak_of_a_step(made) == pytest.approx(cost.memory - before, rel=0.25)


def test_fixed_memory_includes_a_frozen_teacher_and_what_is_saved_once(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Student, gradient, two moments and average are five copies of the weights; both other parts come on top."""

    class Frozen:
        def network(self, preset: Preset) -> Network:
            return preset.network()

    monkeypatch.setattr(device, "has_bfloat16", lambda device: True)  # any CPU can count its copies
    made = plan(images, *SMALL, "training.batch_size=8", "training.precision=float32")
    alone, half = estimate(made), estimate(plan(images, *SMALL, "training.batch_size=8", "training.precision=bfloat16"))
    frozen = made.preset.model_copy(update={"teacher": made.preset.teacher.model_copy(update={"frozen": True})})
    taught = estimate(replace(made, preset=frozen, teacher=Frozen()))
    assert alone.fixed >= 5 * 4 * alone.parameters
    assert taught.fixed - alone.fixed == pytest.approx(4 * alone.parameters, rel=0.02)
    assert half.fixed > alone.fixed, "copies of the weights in bfloat16"


@pytest.mark.slow
def test_low_resolution_takes_less_compute_and_the_same_peak_memory(images: Path) -> None:
    low = "views.low_resolution={epochs=4, global_size=32, local_size=16}"
    small = [f"views.{view}.size={size}" for view, size in (("global_1", 32), ("global_2", 32), ("local", 16))]
    full, less, both, early = (
        estimate(plan(images, "training.batch_size=8", *more, stop=stop))
        for more, stop in (((), 400), (small, 400), ([low], 400), ([low], 100))
    )
    assert both.flops == pytest.approx((full.flops + less.flops) / 2)
    assert both.flops < 0.8 * full.flops
    assert (both.memory, early.memory) == (full.memory, less.memory)
    assert early.flops == pytest.approx(less.flops)
    assert estimate(plan(images, "training.batch_size=8", low, stop=0)).flops > 0


def test_mixed_sizes_count_by_their_shares_in_compute_and_by_the_largest_in_memory(images: Path) -> None:
    small, large = (f"views.mixed=[{{global_size={size}, share=1}}]" for size in (32, 64))
    both = "views.mixed=[{global_size=64, share=1}, {global_size=32, share=3}]"
    less, more, mixed = (
        estimate(plan(images, *SMALL, "training.batch_size=8", m, stop=400)) for m in (small, large, both)
    )
    assert mixed.flops == pytest.approx((3 * less.flops + more.flops) / 4)
    assert mixed.memory == more.memory > less.memory
    assert estimate(plan(images, *SMALL, "training.batch_size=8", both, stop=0)).flops > 0


def test_logits_of_masked_patches_count_in_the_estimate(images: Path) -> None:
    alone, both = (
        estimate(plan(images, "training.batch_size=8", *more, preset="tiny-dinov2"))
        for more in (("losses.ibot=none", "losses.koleo=none"), ())
    )
    assert both.flops > alone.flops
    assert both.waiting > alone.waiting, "targets of masked patches"
    assert both.image > alone.image, "logits of masked patches"


def test_the_gram_teacher_counts_in_the_estimate_also_if_it_comes_late(images: Path) -> None:
    alone, early, late = (
        estimate(plan(images, "training.batch_size=8", *more, preset="tiny-dinov2"))
        for more in ((), ("losses.gram={weight=1.0, scale=2}",), ("losses.gram={weight=1.0, scale=2, first_update=3}",))
    )
    assert early.flops == late.flops > 1.5 * alone.flops, "its crops have four times the pixels"
    assert early.fixed > alone.fixed and early.waiting > alone.waiting and early.image > alone.image


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", [False, True])
def test_a_gpu_takes_the_estimated_memory(images: Path, recompute: bool) -> None:
    cuda = torch.device("cuda")
    wide = ["backbone.options={depth=6,embed_dim=384,num_heads=6,img_size=64,patch_size=8}", "training.batch_size=8"]
    made = replace(plan(images, *wide, "training.precision=bfloat16", recompute=recompute), device=cuda)
    trainer = Trainer(
        made.method().to(cuda), made.preset.optimizer, made.clock, batch_size=8, precision=autocast(cuda, "bfloat16")
    )
    batch = Batch(torch.randn(2, 8, 3, 48, 48, device=cuda), torch.randn(4, 8, 3, 24, 24, device=cuda), torch.arange(8))
    trainer.step(batch)
    torch.cuda.reset_peak_memory_stats()
    trainer.step(batch)
    assert torch.cuda.max_memory_allocated() == pytest.approx(estimate(made).memory, rel=0.25)


def test_activation_checkpointing_takes_less_memory_and_more_compute(images: Path) -> None:
    once, again = (estimate(plan(images, *SMALL, "training.batch_size=8", recompute=again)) for again in (False, True))
    assert again.image < 0.6 * once.image
    assert 1.1 * once.flops < again.flops < 4 / 3 * once.flops


def whole(again: bool) -> Estimate:
    return Estimate(1, 1, 1.0, 0.04e9, 0.01e9, 0.03e9 if again else 0.1e9, 96, 96, 1.0)


@pytest.mark.parametrize(
    ("free", "typed", "takes"),
    [
        (100e9, {}, 10.6e9),
        (7e9, {"--accumulate": "2"}, 5.8e9),
        (3e9, {"--accumulate": "6"}, 2.6e9),
        (2.7e9, {"--recompute": "", "--accumulate": "3"}, 1.96e9),  # 16 at once without --recompute would take 2.6
        (1.2e9, {"--recompute": "", "--accumulate": "48"}, 1.06e9),
        (1.1e9, None, 0.0),
    ],
)
def test_the_fewest_parts_that_fit_are_suggested(free: float, typed: dict | None, takes: float) -> None:
    found = to_fit(whole, free)
    assert (found and found[0]) == typed
    if found:
        assert found[1].memory == pytest.approx(takes)
        assert found[1].fits(free)


def test_each_cost_is_computed_once() -> None:
    calls: list[bool] = []
    assert to_fit(lambda again: calls.append(again) or whole(again), 1.1e9) is None
    assert calls == [False, True]


def test_a_backbone_without_blocks_gets_smaller_parts() -> None:
    def cost(again: bool) -> Estimate:
        if again:
            raise DinoError("no blocks", "")
        return whole(again)

    assert to_fit(cost, 1.5e9) == ({"--accumulate": "32"}, replace(whole(False), at_once=3))
