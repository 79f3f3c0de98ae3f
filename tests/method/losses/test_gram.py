from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dinocli.core.errors import DinoError
from dinocli.data.loader.batch import Batch
from dinocli.data.views.masking import PatchMasks
from dinocli.engine.checkpoint import restore, state_of
from dinocli.engine.schedules import Clock, Constant
from dinocli.engine.trainer import Trainer
from dinocli.method.losses.gram import GramLossConfig, downsampled, gram_loss
from dinocli.method.preset import Preset, load_preset
from dinocli.models.backbone import MaskedPatches

ONE = Constant(kind="constant", value=1.0)


def plain_loss(student: Tensor, teacher: Tensor) -> float:
    """Compute the definition image by image and pair by pair, with numpy. [B, N, D] and [B, N, D']"""
    total, (images, patches) = 0.0, student.shape[:2]
    for of_student, of_teacher in zip(student.numpy(), teacher.numpy(), strict=True):
        for i in range(patches):
            for j in range(patches):
                cosines = [
                    float(x[i] @ x[j] / np.sqrt((x[i] @ x[i]) * (x[j] @ x[j]))) for x in (of_student, of_teacher)
                ]
                total += (cosines[0] - cosines[1]) ** 2
    return total / (images * patches**2)


@pytest.mark.parametrize(("images", "patches", "width", "other"), [(1, 2, 3, 3), (3, 9, 5, 5), (2, 16, 8, 6)])
def test_equals_the_definition(images: int, patches: int, width: int, other: int) -> None:
    torch.manual_seed(0)
    student, teacher = (torch.randn(images, patches, d, dtype=torch.float64) for d in (width, other))
    assert float(gram_loss(student, teacher)) == pytest.approx(plain_loss(student, teacher), rel=1e-10)
    assert float(gram_loss(student, 3 * student)) == pytest.approx(0, abs=1e-28), "lengths do not count"


def test_the_gradient_equals_the_derivative_of_the_definition() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True), torch.randn(2, 4, 3).double()
    assert torch.autograd.gradcheck(lambda x: gram_loss(x, teacher), student)


def test_autocast_does_not_round_the_loss() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 9, 16), torch.randn(2, 9, 16)
    expected = gram_loss(student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gram_loss(student, teacher), expected)


def bicubic_weights(many: int, few: int) -> Tensor:
    """Compute the weights of a bicubic, antialiased downsampling along a line, with the kernel at a = -0.5. [few, many]"""

    def kernel(x: float) -> float:
        x = abs(x)
        if x < 1:
            return 1.5 * x**3 - 2.5 * x**2 + 1
        return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0

    scale = many / few
    weights = [[kernel((j + 0.5 - scale * (i + 0.5)) / scale) for j in range(many)] for i in range(few)]
    table = torch.tensor(weights, dtype=torch.float64)
    return table / table.sum(1, keepdim=True)


def test_features_are_downsampled_bicubic_with_antialias() -> None:
    torch.manual_seed(0)
    patches = torch.randn(2, 64, 5, dtype=torch.float64)
    weights = bicubic_weights(8, 4)
    expected = torch.einsum("ir,jc,brcd->bijd", weights, weights, patches.view(2, 8, 8, 5)).flatten(1, 2)
    torch.testing.assert_close(downsampled(patches, (8, 8), (4, 4)), expected, rtol=1e-10, atol=1e-12)
    assert downsampled(patches, (8, 8), (8, 8)) is patches


def test_the_average_is_copied_on_schedule() -> None:
    def updates(config: GramLossConfig) -> list[int]:
        return [step for step in range(60) if config.is_update(Clock(5, 12, step))]

    assert updates(GramLossConfig(weight=ONE)) == [0]
    assert updates(GramLossConfig(weight=ONE, first_update=2)) == [10]
    assert updates(GramLossConfig(weight=ONE, first_update=2, update_every=3)) == [10, 25, 40, 55]
    assert updates(GramLossConfig(weight=ONE, first_update=2, update_every=3, max_updates=2)) == [10, 25]
    active = [GramLossConfig(weight=ONE, first_update=2).is_active(Clock(5, 12, step)) for step in range(60)]
    assert active == [False] * 10 + [True] * 50


SIZES = {"prototypes": 16, "hidden": 16, "bottleneck": 8, "batch_norm": "false"}
SMALL = [
    "backbone.options={img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2}",
    *(f"heads.{head}.{key}={value}" for head in ("dino", "ibot") for key, value in SIZES.items()),
    "optimizer.lr.warmup_epochs=0", "losses.koleo=none",
    "views.global_1.size=16", "views.global_2.size=16", "views.local.size=8",
]  # fmt: skip
GRAM = "losses.gram={weight={kind='cosine', start=0.5, end=2.0}, first_update=1, update_every=1, scale=2}"


def small_preset(*more: str) -> Preset:
    return load_preset("tiny-dinov2", [*SMALL, *more])


def draw_batch(step: int, images: int = 4, scale: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(step)
    shapes = [(2, 16), (4, 8), (2, 16 * scale)]
    crops, small, clean = (torch.randn(v, images, 3, s, s, generator=generator).double() for v, s in shapes)
    where = torch.zeros(2, images, 16, dtype=torch.bool)
    where[0, 1, :3] = where[1, 0, 2:8] = where[1, 2, 5:9] = where[0, 3, 9:12] = True
    masks = PatchMasks.of(where)
    masks = PatchMasks(where, masks.rows, masks.weights.double(), masks.counts)
    return Batch(crops, small, torch.arange(images), masks, clean)


def make_trainer(preset: Preset, step: int = 0, accumulate: int = 1) -> Trainer:
    torch.manual_seed(0)
    method = preset.method().double()
    return Trainer(
        method, preset.optimizer, Clock(2, 8, step), batch_size=4, accumulate=accumulate, seed=0, guarded=True
    )


def test_the_step_compares_masked_student_crops_with_the_copy_of_the_average() -> None:
    """A step with everything written out: no mask for the Gram teacher, larger crops, both global crops."""
    trainer = make_trainer(small_preset(GRAM))
    method, copies = trainer.method, []
    for step in range(5):
        if step in (2, 4):
            copies.append({k: v.clone() for k, v in method.average.backbone.state_dict().items()})
        batch = draw_batch(step)
        masked = batch.masks.where.flatten(0, 1)
        images, clean = batch.global_crops.flatten(0, 1), batch.clean_crops.flatten(0, 1)
        student = method.student.backbone(images, MaskedPatches(masked, method.student.mask_token)).patches.detach()
        values = trainer.step(batch, log=True)
        if step < 2:
            assert (float(values["gram"]), values["gram/weight"]) == (0, 0), "before the first copy"
            continue
        assert all(torch.equal(v, copies[-1][k]) for k, v in method.gram.backbone.state_dict().items()), step
        with torch.no_grad():
            anchor = method.gram.backbone(clean).patches
        weights = bicubic_weights(8, 4)
        anchor = torch.einsum("ir,jc,brcd->bijd", weights, weights, anchor.unflatten(1, (8, 8))).flatten(1, 2)
        weight = 2.0 + 0.5 * (0.5 - 2.0) * (1 + math.cos(math.pi * step / 16))
        assert float(values["gram"]) == pytest.approx(weight * plain_loss(student, anchor), rel=1e-10)
        assert values["gram/weight"] == pytest.approx(weight)
    assert float(values["gram"]) > 1e-4
    assert not any(p.requires_grad for p in method.gram.parameters()) and not method.gram.training
    assert not torch.equal(copies[0]["model.norm.weight"], copies[1]["model.norm.weight"])


def test_a_step_in_parts_equals_the_step_of_the_whole_batch() -> None:
    ends = []
    for parts in (1, 2):
        trainer = make_trainer(small_preset(GRAM), accumulate=parts)
        values = [trainer.step(draw_batch(step), log=True) for step in range(4)]
        ends.append((values[-1], trainer.method.state_dict()))
    for key, value in ends[0][0].items():
        torch.testing.assert_close(ends[1][0][key], value, rtol=1e-9, atol=1e-12, msg=key)
    for key, value in ends[0][1].items():
        torch.testing.assert_close(ends[1][1][key], value, rtol=1e-7, atol=1e-9, msg=key)


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5])
def test_a_resumed_run_ends_in_the_same_bits(stop: int) -> None:
    """States before, at and after a copy of the average."""
    preset = small_preset(GRAM.replace("update_every=1", "update_every=2"))
    whole = make_trainer(preset)
    for step in range(7):
        whole.step(draw_batch(step))
    first = make_trainer(preset)
    for step in range(stop):
        first.step(draw_batch(step))
    state = {key: value.clone() for key, value in state_of(first).items()}
    assert "method/gram.backbone.model.norm.weight" in state
    second = make_trainer(preset, stop)
    restore(second, state)
    for step in range(stop, 7):
        second.step(draw_batch(step))
    ends = state_of(whole), state_of(second)
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())


def test_a_skipped_step_keeps_the_copy() -> None:
    trainer = make_trainer(small_preset(GRAM.replace("first_update=1", "first_update=0")))
    trainer.step(draw_batch(0))
    trainer.step(draw_batch(1))
    batch = draw_batch(2)
    batch.global_crops[0, 0] = torch.nan
    average = {k: v.clone() for k, v in trainer.method.average.backbone.state_dict().items()}
    trainer.step(batch)
    assert trainer.skipped.tolist() == [1, 1]
    assert all(torch.equal(v, average[k]) for k, v in trainer.method.gram.backbone.state_dict().items())


def test_without_the_table_nothing_is_built_computed_or_stored() -> None:
    preset = small_preset()
    trainer = make_trainer(preset)
    assert trainer.method.gram is None and preset.clean_scale is None
    passed = []
    trainer.method.student.backbone.register_forward_hook(lambda *each: passed.append(each))
    (part,) = trainer.method.parts(draw_batch(0), 1, trainer.clock)
    assert not part.anchored and trainer.method.encode(part).patches is None
    assert not any("gram" in key for key in state_of(trainer))
    assert "gram" not in trainer.step(draw_batch(0), log=True)


def test_the_map_of_a_convolutional_network_counts_as_patches() -> None:
    preset = load_preset(
        "resnet50",
        [
            "backbone.name=resnet18", "heads.dino.prototypes=16", "heads.dino.hidden=16", "heads.dino.bottleneck=8",
            "losses.gram={weight=1.0, scale=1.5}",
        ],
    )  # fmt: skip
    method = preset.method()
    crops, local, clean = (torch.randn(v, 2, 3, s, s) for v, s in ((2, 64), (2, 32), (2, 96)))
    clock = Clock(1, 300)
    method.before_step(clock)
    (part,) = method.parts(Batch(crops, local, torch.arange(2), None, clean), 1, clock)
    # BatchNorm's statistics of a student in training differ from the anchor's running ones.
    student = method.student.backbone(crops.flatten(0, 1)).patches.detach()
    with torch.no_grad():
        anchor = method.gram.backbone(clean.flatten(0, 1)).patches
    assert (student.shape, anchor.shape) == ((4, 4, 512), (4, 9, 512))
    anchor = F.interpolate(anchor.mT.unflatten(2, (3, 3)), size=2, mode="bicubic", antialias=True).flatten(2).mT
    expected = plain_loss(student.double(), anchor.double())
    assert float(method(part)["gram"].detach()) == pytest.approx(expected, rel=1e-4)
    assert expected > 1e-6


@pytest.mark.parametrize(
    ("overrides", "message", "hint"),
    [
        (["losses.gram.scale=1.4"], "losses.gram.scale is 1.4: crops of 22 pixels", "--set losses.gram.scale=1.5"),
        (
            ["views.global_1.size=8", "views.global_2.size=8", "backbone.options.patch_size=8"],
            "gives one patch at 8 pixels",
            "--set losses.gram=none",
        ),
        (["losses.gram.weight=0.0"], "losses.gram.weight is always 0", "--set losses.gram.weight.value=2.0"),
        (["losses.gram.weight=-1.0"], "losses.gram.weight.value is -1; expected 0 or more", "weight.value=2.0"),
        (["losses.gram.scale=0.5"], "losses.gram.scale should be greater than or equal to 1", "--set"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_training(overrides: list[str], message: str, hint: str) -> None:
    with pytest.raises(DinoError) as error:
        small_preset("losses.gram={weight={kind='constant', value=1.0}}", *overrides).method()
    assert message in error.value.message
    assert hint in error.value.hint


def test_a_backbone_without_patches_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from dinocli.models.transformer import ViTBackbone

    of_all = ViTBackbone.last_tokens

    def pooled(self: ViTBackbone, *arguments: object) -> list[object]:
        return [replace(tokens, patches=tokens.patches[:, :0], grid=(0, 0)) for tokens in of_all(self, *arguments)]

    monkeypatch.setattr(ViTBackbone, "last_tokens", pooled)
    with pytest.raises(DinoError, match="gives no patches at 16 pixels"):
        small_preset("losses.gram={weight=1.0}").method()
