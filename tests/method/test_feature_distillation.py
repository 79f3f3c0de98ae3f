"""A student predicts the standardized features of frozen teachers."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import together

from dinocli.data.loader.batch import Batch
from dinocli.engine.checkpoint import restore, state_of
from dinocli.engine.parallel import parallel
from dinocli.engine.schedules import Clock
from dinocli.engine.trainer import Trainer
from dinocli.method.feature_distillation import FeatureDistillation, Target, Teacher, resized
from dinocli.method.preset import Preset, load_preset
from dinocli.models.architecture import BackboneConfig

STUDENT = "backbone.options={img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2}"
SHAPES = [STUDENT, "views.global_1.size=32", "losses.features.adaptor={kind='mlp', hidden=12, layers=2}"]


def preset_of(*more: str) -> Preset:
    return load_preset("distill-features", [*SHAPES, "teacher.momentum={kind='constant', value=0.75}", *more])


def teacher_of(seed: int = 1, patch: int = 8, size: int = 32, width: int = 24, mean: float = 0.5) -> Teacher:
    torch.manual_seed(seed)
    options = {"img_size": size, "patch_size": patch, "embed_dim": width, "depth": 2, "num_heads": 2}
    backbone = BackboneConfig(name="vit_tiny_patch16_224", options=options).build(drop_path=False)
    for parameter in backbone.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    side = size // patch
    return Teacher(backbone, (mean,) * 3, (0.3,) * 3, size, (side, side))


def method_of(preset: Preset, *teachers: Teacher) -> FeatureDistillation:
    torch.manual_seed(0)
    method = preset.feature_method(teachers or [teacher_of()]).double()
    method.fit_standardizers(batch_of(size=size, seed=s) for s in (7, 8) for size in [32])
    return method


def batch_of(images: int = 4, size: int = 32, views: int = 1, seed: int = 3) -> Batch:
    crops = torch.randn(views, images, 3, size, size, generator=torch.Generator().manual_seed(seed)).double()
    return Batch(crops, None, torch.arange(images))


def by_hand(method: FeatureDistillation, preset: Preset, batch: Batch, teachers: list[Teacher]) -> torch.Tensor:
    """The loss, view by view and image by image, from the networks alone."""
    views, total = preset.views, []
    for i, teacher in enumerate(teachers):
        backbone = copy.deepcopy(teacher.backbone).double().eval()
        standard = method.standardizers[i]
        for crop in batch.global_crops.flatten(0, 1):
            pixels = crop * torch.tensor(views.std)[:, None, None].double() + torch.tensor(views.mean)[:, None, None]
            theirs = (pixels - torch.tensor(teacher.mean)[:, None, None]) / torch.tensor(teacher.std)[:, None, None]
            seen = F.interpolate(theirs[None], (teacher.size, teacher.size), mode="bicubic", antialias=True)
            tokens = backbone(theirs[None] if teacher.size == crop.shape[-1] else seen)
            cls = (tokens.cls - standard.class_mean) / standard.class_std
            patches = (tokens.patches - standard.patch_mean) / standard.patch_std
            student = method.student.backbone(crop[None])
            predicted = method.adaptors[i]["patch"](student.patches)
            if student.grid != tokens.grid:
                maps = predicted.mT.unflatten(2, student.grid)
                predicted = F.interpolate(maps, tokens.grid, mode="bilinear", antialias=True).flatten(2).mT
            similar = F.cosine_similarity(method.adaptors[i]["class"](student.cls), cls)
            near = F.cosine_similarity(predicted, patches, dim=-1).mean()
            total.append((1 - similar.mean()) + 0.9 * (1 - near) + 0.1 * F.smooth_l1_loss(predicted, patches))
    return torch.stack(total).mean()


@pytest.mark.parametrize("views", [1, 2])
def test_the_loss_is_the_mean_over_views_images_and_teachers(views: int) -> None:
    teachers = [teacher_of(), teacher_of(seed=2, patch=4, size=28, width=18, mean=0.4)]
    preset = preset_of()
    method, batch = method_of(preset, *teachers), batch_of(views=views)
    expected = by_hand(method, preset, batch, teachers)
    for count in (1, 2):
        parts = method.parts(batch, count, Clock(4, 8))
        losses = [method(part) for part in parts]
        assert set(losses[0]) == {
            f"{n}_{i}" for n in ("class_cosine", "patch_cosine", "patch_smooth_l1") for i in (1, 2)
        }
        loss = torch.stack([torch.stack(list(terms.values())).sum() for terms in losses]).mean()
        # The affine change of normalization is stored in float32.
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        method.metrics(parts, {k: v.detach() for k, v in losses[0].items()}, Clock(4, 8))["features/class"],
        1 - (losses[0]["class_cosine_1"] + losses[0]["class_cosine_2"]).detach(),
    )


def test_teacher_and_student_may_see_two_sizes_of_the_same_view() -> None:
    method = method_of(preset_of(), teacher_of(size=48))
    (part,) = method.parts(batch_of(size=48), 1, Clock(4, 8))
    assert part.targets[0].patches.shape == (1, 4, 36, 24)
    seen = []
    method.student.backbone.register_forward_pre_hook(lambda module, given: seen.append(given[0].shape[-1]))
    assert method(part)["patch_cosine"].isfinite()
    assert seen == [32]
    x = torch.randn(2, 3, 48, 48)
    assert resized(x, 48) is x and resized(x, 32).shape == (2, 3, 32, 32)


@pytest.mark.parametrize(
    ("weights", "used"), [(["class_cosine=0.0"], {"patch"}), (["patch_cosine=0.0", "patch_smooth_l1=0.0"], {"class"})]
)
def test_an_adaptor_without_a_loss_is_not_built(weights: list[str], used: set[str]) -> None:
    method = method_of(preset_of(*(f"losses.features.{weight}" for weight in weights)))
    assert set(method.adaptors[0]) == used
    (part,) = method.parts(batch_of(), 1, Clock(4, 8))
    losses = method(part)
    assert {name.split("_")[0] for name in losses} == used
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None for group in method.param_groups() for p in group.params), "as DDP needs it"


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv4_conv_small", "convnext_atto", "vit_tiny_patch16_224"])
def test_a_student_may_be_any_vit_or_convolutional_network(name: str) -> None:
    preset = load_preset("distill-features", [f"backbone.name={name}", "views.global_1.size=64"])
    method = preset.feature_method([teacher_of()])
    batch = Batch(torch.randn(1, 2, 3, 64, 64), None, torch.arange(2))
    (part,) = method.parts(batch, 1, Clock(4, 8))
    torch.stack(list(method(part).values())).sum().backward()
    assert all(p.grad is not None for p in method.student.parameters() if p.requires_grad)


def trainer_of(preset: Preset, images: int = 4) -> Trainer:
    optimizer = preset.optimizer.model_copy(update={"lr": preset.optimizer.lr.model_copy(update={"warmup_epochs": 0})})
    return Trainer(method_of(preset), optimizer, Clock(4, 8), batch_size=images, seed=0, guarded=True)


def test_only_student_adaptors_and_average_change_and_the_teachers_stay_in_evaluation_mode() -> None:
    trainer = trainer_of(preset_of())
    method = trainer.method
    method.train()
    assert method.student.training and not method.teachers.training and not method.average.training
    before = {name: value.clone() for name, value in method.state_dict().items()}
    trainer.step(batch_of())
    after = method.state_dict()
    changed = {name.split(".")[0] for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {"student", "average", "adaptors"}
    for name, value in method.average.named_parameters():
        student = dict(method.student.named_parameters())[name]
        torch.testing.assert_close(value.data, 0.75 * before[f"average.{name}"] + 0.25 * student.data)


def test_the_average_takes_batch_norm_statistics_of_the_student_and_a_skipped_step_changes_nothing() -> None:
    preset = load_preset("distill-features", ["backbone.name=resnet18", "views.global_1.size=64",
                                              "teacher.momentum={kind='constant', value=0.75}"])  # fmt: skip
    trainer = Trainer(preset.feature_method([teacher_of()]), preset.optimizer, Clock(4, 8), batch_size=2, guarded=True)
    batch = Batch(torch.randn(1, 2, 3, 64, 64), None, torch.arange(2))
    trainer.step(batch)
    own, student = trainer.method.average.backbone.model.bn1, trainer.method.student.backbone.model.bn1
    torch.testing.assert_close(own.running_var, 0.75 + 0.25 * student.running_var)
    assert own.num_batches_tracked == 1
    before = {k: v.clone() for k, v in trainer.method.state_dict().items()}
    trainer.step(replace(batch, global_crops=batch.global_crops * torch.nan))
    assert int(trainer.skipped[0]) == 1
    assert all(torch.equal(v, before[k]) for k, v in trainer.method.state_dict().items())


def test_a_state_holds_the_statistics_and_no_teacher() -> None:
    trainer = trainer_of(preset_of())
    trainer.step(batch_of())
    state = state_of(trainer)
    names = {key.split("/")[1].split(".")[0] for key in state if key.startswith("method/")}
    assert names == {"student", "average", "adaptors", "standardizers"}
    again = trainer_of(preset_of())
    again.method.standardizers[0].class_mean.zero_()
    restore(again, state)
    assert torch.equal(again.method.standardizers[0].class_mean, trainer.method.standardizers[0].class_mean)


def test_stored_features_replace_the_teachers() -> None:
    method, batch = method_of(preset_of()), replace(batch_of(), places=torch.tensor([5, 1, 0, 3]))
    (made,) = method.targets(batch)
    expected = [method(part) for part in method.parts(batch, 2, Clock(4, 8))]
    everything = {int(p): i for i, p in enumerate(batch.places)}

    def read(places: torch.Tensor) -> list[Target]:
        rows = [everything[int(p)] for p in places]
        return [Target(made.cls[:, rows], made.patches[:, rows])]

    method.stored = read
    del method.teachers[:]
    parts = [method(part) for part in method.parts(method.prepare(batch), 2, Clock(4, 8))]
    for one, other in zip(parts, expected, strict=True):
        assert all(torch.allclose(one[name], other[name], rtol=1e-12) for name in one)


def test_groups_hold_every_trained_parameter_once_and_norms_have_no_decay() -> None:
    method = method_of(preset_of("backbone.learning={layer_decay=0.5, patch_embed=0.2, frozen_epochs=3}"))
    groups = method.param_groups()
    trained = [p for group in groups for p in group.params]
    expected = [*method.student.backbone.model.parameters(), *method.adaptors.parameters()]
    assert {id(p) for p in trained} == {id(p) for p in expected} and len(trained) == len(expected)
    assert all((p.ndim > 1) == group.decay or p.ndim > 1 for group in groups for p in group.params)
    adaptors = {id(p) for p in method.adaptors.parameters()}
    for group in groups:
        for p in group.params:
            assert (group.frozen_epochs == 0) == (id(p) in adaptors)
    embedding = method.student.backbone.model.patch_embed.proj.weight
    (group,) = [group for group in groups if any(p is embedding for p in group.params)]
    assert group.lr_scale == pytest.approx(0.5**2 * 0.2)


def run_share(kind: str, rank_images: int) -> dict[str, torch.Tensor]:
    from dinocli.core.distributed import rank

    preset = preset_of()
    method = method_of(preset)
    optimizer = preset.optimizer.model_copy(update={"lr": preset.optimizer.lr.model_copy(update={"warmup_epochs": 0})})
    trainer = Trainer(method, optimizer, Clock(4, 8), batch_size=4, seed=0, guarded=True, parallel=parallel(kind))
    whole, share = batch_of(), slice(rank() * rank_images, (rank() + 1) * rank_images)
    for _ in range(2):
        trainer.step(Batch(whole.global_crops[:, share], None, whole.rows[share]))
    return {k: v.float() for k, v in state_of(trainer).items() if k.startswith("method/")}


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_train_as_one(kind: str) -> None:
    trainer = trainer_of(preset_of())
    for _ in range(2):
        trainer.step(batch_of())
    alone = {k: v.float() for k, v in state_of(trainer).items() if k.startswith("method/")}
    for found in together(2, run_share, kind, 2):
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
