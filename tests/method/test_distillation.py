from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import PRECISIONS, TOLERANCE, Original, assert_original
from timm.models.vision_transformer import VisionTransformer

from dinocli.data.loader.batch import Batch
from dinocli.data.views.masking import PatchMasks, blocks, deal
from dinocli.engine.optim import AdamWConfig, ClipEach, LinearRule
from dinocli.engine.schedules import Clock, Cosine, LinearByEpoch
from dinocli.engine.trainer import Trainer
from dinocli.method.distillation import SelfDistillation
from dinocli.method.losses import LossesConfig
from dinocli.method.losses.dino import DinoLossConfig
from dinocli.method.losses.targets import CenteringConfig
from dinocli.method.preset import Preset, load_preset
from dinocli.models.backbone import MaskedPatches
from dinocli.models.head import HeadConfig
from dinocli.models.network import Encoding, Network
from dinocli.models.transformer import ViTBackbone


def make_network(made: dict) -> Network:
    vit, head, args = made["vit"], made["head"], made["args"]
    model = VisionTransformer(
        img_size=vit["img"],
        patch_size=vit["patch"],
        embed_dim=vit["embed"],
        depth=vit["depth"],
        num_heads=vit["heads"],
        num_classes=0,
    )
    config = HeadConfig(
        prototypes=head["out_dim"],
        hidden=head["hidden_dim"],
        bottleneck=head["bottleneck_dim"],
        layers=3,
        norm_last_layer=made["norm_last_layer"],
        freeze_last_layer_epochs=args["freeze_last_layer"],
    )
    return Network(ViTBackbone(model, "dino"), {"dino": config.build(vit["embed"])})


def to_our_keys(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k.replace("head.", "heads.dino.", 1) if k.startswith("head.") else k: v for k, v in weights.items()}


def to_original_name(name: str) -> str:
    return name.replace(".model.", ".").replace("heads.dino.", "head.")


def make_trainer(stored: Original, case: str, dtype: torch.dtype) -> Trainer:
    made = stored.made["train"][case]
    args = made["args"]
    student = make_network(made).double()
    student.load_weights(to_our_keys(stored.below(f"train/{case}/init/")), "the fixture")
    temperature = LinearByEpoch(
        kind="linear_by_epoch",
        start=args["warmup_teacher_temp"],
        end=args["teacher_temp"],
        epochs=args["warmup_teacher_temp_epochs"],
    )
    loss = DinoLossConfig(
        weight=1.0,
        head="dino",
        student_temperature=0.1,
        targets=CenteringConfig(kind="centering", momentum=0.9, temperature=temperature),
    )
    momentum = Cosine(kind="cosine", start=args["momentum_teacher"], end=1.0)
    method = SelfDistillation(student, make_network(made).double(), LossesConfig(dino=loss), momentum).to(dtype)
    config = AdamWConfig(
        kind="adamw",
        betas=(0.9, 0.999),
        lr=Cosine(kind="cosine", start=args["lr"], end=args["min_lr"], warmup_epochs=args["warmup_epochs"]),
        lr_rule=LinearRule(kind="linear", batch=256),
        weight_decay=Cosine(kind="cosine", start=args["weight_decay"], end=args["weight_decay_end"]),
        clip=ClipEach(kind="each_parameter", norm=args["clip_grad"]),
    )
    return Trainer(method, config, Clock(made["niter_per_epoch"], args["epochs"]), batch_size=made["batch"])


@pytest.fixture
def trainer(original) -> Trainer:
    return make_trainer(original, "micro_f64", torch.float64)


def record_steps(method: SelfDistillation) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return dictionaries that each step fills: the logits of both networks, and gradient norms before clipping."""
    logits: dict[str, torch.Tensor] = {}
    norms: dict[str, torch.Tensor] = {}
    for which in ("student", "teacher"):

        def record(module: object, crops: object, encoding: Encoding, which: str = which) -> None:
            logits[which] = encoding.class_logits["dino"].detach().clone().flatten(0, 1)

        getattr(method, which).register_forward_hook(record)
    for key, parameter in method.student.named_parameters():
        if parameter.requires_grad:

            def measure(p: torch.Tensor, name: str = to_original_name(key)) -> None:
                norms[name] = p.grad.norm()

            parameter.register_post_accumulate_grad_hook(measure)
    return logits, norms


def assert_steps(stored: Original, case: str, dtype: torch.dtype) -> None:
    """Compare each stored step: logits, gradient norms and loss, and weights and center after it if they are stored."""
    made, trainer = stored.made["train"][case], make_trainer(stored, case, dtype)
    crops = [stored[f"train/{case}/crops/{i}"].to(dtype) for i in range(2 + made["n_local"])]
    batch = Batch(torch.stack(crops[:2]), torch.stack(crops[2:]), torch.arange(made["batch"]))
    method = trainer.method
    logits, before_clip = record_steps(method)
    for step in range(made["steps"]):
        values = trainer.step(batch)
        for name in ("student", "teacher"):
            assert_original(logits[name], stored[f"train/{case}/step{step}/{name}_out"], f"{name} in step {step}")
        norms = stored[f"train/{case}/step{step}/grad_norms"]
        for name, expected in zip(made["grad_norm_param_order"], norms, strict=True):
            assert_original(before_clip[name], expected, f"gradient of {name} in step {step}")
        assert_original(values["loss"], stored[f"train/{case}/losses"][step], f"loss of step {step}")
        assert_original(values["grad_norm"], norms.norm(), f"gradient norm of step {step}")
        for name, ours in (("student", method.student), ("teacher", method.teacher)):
            weights = ours.weights()
            for key, expected in to_our_keys(stored.below(f"train/{case}/after{step + 1}/{name}/")).items():
                # The exact gradient of the keys' bias is zero, so Adam's steps for it come from rounding errors.
                compared = slice(None) if not key.endswith("qkv.bias") else torch.arange(96) // 32 != 1
                assert_weights(weights[key][compared], expected[compared], f"{name} {key} after step {step}")
        if f"train/{case}/after{step + 1}/center" in stored.tensors:
            center = stored[f"train/{case}/after{step + 1}/center"][0]
            assert_original(method.losses["dino"].targets.center, center, f"center after step {step}")


def assert_weights(ours: torch.Tensor, theirs: torch.Tensor, what: str) -> None:
    """Equal to the original's after a step of AdamW.

    AdamW divides by the size of a gradient, so the rounding error of one that nearly vanishes moves its weight by up to
    the rate, whichever CPU rounds. A few weights of float32 may therefore differ by more than their precision.
    """
    if ours.dtype == torch.float64:
        assert_original(ours, theirs, what)
    else:
        error, scale = (x.square().mean().sqrt() for x in (ours - theirs, theirs))
        assert error <= TOLERANCE[ours.dtype] * (1 + scale), f"{what}: {error}"


@PRECISIONS
def test_five_steps_equal_the_originals(original, dtype: torch.dtype) -> None:
    assert_steps(original, "micro_f64", dtype)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        ("micro_f64", torch.float64),
        ("micro_f64", torch.float32),
        ("micro_f32", torch.float32),
        ("micro_nonorm_noclip_f64", torch.float64),
        ("micro_nonorm_noclip_f64", torch.float32),
    ],
)
def test_every_step_equals_the_original_in_the_larger_set(more, case: str, dtype: torch.dtype) -> None:
    assert_steps(more, case, dtype)


def test_both_sets_of_the_originals_numbers_agree(original, more) -> None:
    both = original.tensors.keys() & more.tensors.keys()
    assert len(both) > 300
    assert all(torch.equal(original[name], more[name]) for name in both)


def test_adam_does_not_count_steps_of_frozen_prototypes(original, trainer: Trainer) -> None:
    made = original.made["train"]["micro_f64"]
    batch = Batch(torch.randn(2, 3, 3, 32, 32, dtype=torch.float64), None, torch.arange(3))
    for _ in range(made["steps"]):
        trainer.step(batch)
    names = {p: n for n, p in trainer.method.student.named_parameters()}
    steps = {to_original_name(names[p]): float(s["step"]) for p, s in trainer.optimizer.state.items()}
    expected = {k: v for k, v in made["adam_step_counts"].items() if v}
    assert steps == expected


def test_parameter_groups_equal_the_originals(original, trainer: Trainer) -> None:
    made = original.made["train"]["micro_f64"]["param_groups"]
    names = {p: to_original_name(n) for n, p in trainer.method.student.named_parameters()}
    for decay, expected in ((True, made["regularized"]), (False, made["not_regularized"])):
        ours = {names[p] for group in trainer.method.param_groups() if group.decay is decay for p in group.params}
        assert ours == set(expected)


def test_layers_have_learning_rates_by_their_depth() -> None:
    """Rates fall towards the input and are lowest in the patch embedding; heads and final norm have the full rate."""
    preset = load_preset(
        "tiny-dino",
        ["backbone.learning={layer_decay=0.5, patch_embed=0.2, frozen_epochs=3}", "backbone.options.depth=2"],
    )
    method = preset.method()
    names = {p: name for name, p in method.student.named_parameters()}
    settings = {}
    for group in method.param_groups():
        for p, module in zip(group.params, group.modules, strict=True):
            settings[names[p]] = (module, pytest.approx(group.lr_scale), group.frozen_epochs, group.decay)
    assert len(settings) == sum(p.requires_grad for p in names)
    last = preset.heads["dino"].freeze_last_layer_epochs
    assert settings["backbone.model.cls_token"] == ("backbone", 0.125, 3, True)
    assert settings["backbone.model.pos_embed"] == ("backbone", 0.125, 3, True)
    assert settings["backbone.model.patch_embed.proj.weight"] == ("backbone", 0.025, 3, True)
    assert settings["backbone.model.blocks.0.norm1.weight"] == ("backbone", 0.25, 3, False)
    assert settings["backbone.model.blocks.1.mlp.fc2.weight"] == ("backbone", 0.5, 3, True)
    assert settings["backbone.model.norm.weight"] == ("backbone", 1.0, 3, False)
    assert settings["heads.dino.mlp.0.weight"] == ("dino", 1.0, 0, True)
    assert settings["heads.dino.last_layer.weight_v"] == ("dino", 1.0, last, True)


def test_the_teacher_starts_as_a_copy_of_the_student_without_gradients(trainer: Trainer) -> None:
    student, teacher = trainer.method.student, trainer.method.teacher
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), teacher.parameters(), strict=True))
    assert not any(p.requires_grad for p in teacher.parameters())


def test_the_first_step_changes_no_weight_because_its_learning_rate_is_zero(trainer: Trainer) -> None:
    before = {k: v.clone() for k, v in trainer.method.student.state_dict().items()}
    trainer.step(Batch(torch.randn(2, 3, 3, 32, 32, dtype=torch.float64), None, torch.arange(3)))
    assert all(torch.equal(v, before[k]) for k, v in trainer.method.student.state_dict().items())


def test_the_teacher_averages_parameters_but_not_batch_norm_statistics() -> None:
    torch.manual_seed(0)
    options = "backbone.options={img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2}"
    small = [options, "heads.dino.prototypes=16", "heads.dino.hidden=16", "heads.dino.bottleneck=8"]
    momentum = "teacher.momentum={kind='constant', value=0.75}"
    method = load_preset("tiny-dino", [*small, momentum, "heads.dino.batch_norm=true"]).method()
    outputs_of: dict[str, list[torch.Tensor]] = {"student": [], "teacher": []}
    for which, outputs in outputs_of.items():
        first = getattr(method, which).heads["dino"].mlp[0]
        first.register_forward_hook(lambda m, i, output, outputs=outputs: outputs.append(output.detach()))
    before = {key: value.clone() for key, value in method.teacher.named_parameters()}
    batch = Batch(torch.randn(2, 4, 3, 16, 16), torch.randn(3, 4, 3, 8, 8), torch.arange(4))
    method(*method.parts(batch, 1, Clock(1, 10)))
    for parameter in method.student.parameters():
        parameter.data.add_(torch.randn_like(parameter))
    method.after_step(Clock(1, 10), torch.tensor(True))
    student = dict(method.student.named_parameters())
    for key, value in method.teacher.named_parameters():
        torch.testing.assert_close(value, 0.75 * before[key] + 0.25 * student[key])
    for which, rows in (("student", 20), ("teacher", 8)):
        (output,) = outputs_of[which]
        statistics = getattr(method, which).heads["dino"].mlp[1]
        assert len(output) == rows
        torch.testing.assert_close(statistics.running_mean, 0.1 * output.mean(0))
        assert statistics.num_batches_tracked == 1


OPTIONS = "backbone.options={img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2}"


def small_preset(name: str, *more: str) -> Preset:
    heads = load_preset(name).heads
    sizes = [
        f"heads.{head}.{key}={value}"
        for head, config in heads.items()
        for key, value in SIZES.items()
        if key != "prototypes" or config.prototypes
    ]
    return load_preset(name, [OPTIONS, *sizes, "optimizer.lr.warmup_epochs=0", *more])


SIZES = {"prototypes": 16, "hidden": 16, "bottleneck": 8, "batch_norm": "false"}


def drawn_batch(images: int, preset: Preset) -> Batch:
    views = torch.randn(6, images, 3, 16, 16, dtype=torch.float64)
    masks = None
    if preset.views.mask:
        counts = deal(preset.views.mask, (2, images), 16, seed=0, batch=0, rank=0)
        generator = np.random.default_rng(0)
        where = [blocks(preset.views.mask, (4, 4), int(count), generator).ravel() for count in counts.flatten()]
        masks = PatchMasks.of(torch.from_numpy(np.stack(where)).view(2, images, 16))
        masks = replace(masks, weights=masks.weights.double())
    return Batch(views[:2], views[2:], torch.arange(images), masks)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("tiny-dino", ()),
        ("tiny-dinov2", ("losses.koleo=none",)),
        ("tiny-dinov2", ("losses.koleo=none", "losses.ibot.visible=0.5")),
        ("ibot-vits16", ("backbone.drop_path=0",)),
        ("tiny-simdino", ()),
        ("tiny-simdino", ("losses.simdino.with_teacher=false", "losses.sigreg={weight=0.02, slices=16}")),
        ("tiny-dinov2", ("losses.koleo=none", "losses.sigreg={weight=0.02, slices=16}")),
        ("simdinov2-vitb16", ("backbone.drop_path=0",)),
    ],
)
def test_a_step_in_parts_equals_the_step_of_the_whole_batch(name: str, more: tuple[str, ...]) -> None:
    """Targets are computed from the whole batch first, so that gradient accumulation changes nothing."""
    preset = small_preset(name, *more)
    ends = []
    for parts in (1, 2, 4):
        torch.manual_seed(0)
        method = preset.method().double()
        trainer = Trainer(method, preset.optimizer, Clock(2, 10), batch_size=8, accumulate=parts)
        for step in range(4):
            torch.manual_seed(step)  # a step in parts may draw random numbers
            values = trainer.step(drawn_batch(8, preset), log=True)
        ends.append((values, method.state_dict()))
    for values, state in ends[1:]:
        for key, value in ends[0][0].items():
            torch.testing.assert_close(value, values[key], rtol=1e-9, atol=1e-12)
        for key, value in ends[0][1].items():
            torch.testing.assert_close(value, state[key], rtol=1e-7, atol=1e-9, msg=key)


def test_the_means_of_several_parts_come_from_the_same_random_draws() -> None:
    """Stochastic depth drops the same branches when a part is encoded for the means and for the gradient."""
    torch.manual_seed(0)
    preset = small_preset("tiny-simdino", "backbone.drop_path=0.5")
    method, loss = preset.method().double(), "simdino"
    parts = method.parts(drawn_batch(8, preset), 2, Clock(2, 10))
    with torch.no_grad():
        again = [method.losses[loss].means(method.encode(part), part.targets[loss]) for part in parts]
        other = [method.losses[loss].means(method.encode(replace(p, seed=p.seed + 1)), p.targets[loss]) for p in parts]
    expected = method.losses[loss].over_batch(again[0])
    torch.testing.assert_close(torch.stack(again).mean(0), expected, rtol=1e-12, atol=0)
    assert not torch.stack(other).mean(0).allclose(expected, rtol=1e-6)


def sinkhorn_knopp(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Sinkhorn-Knopp by its definition: normalize over samples and over prototypes in turn."""
    q = (logits.flatten(0, -2) / temperature).exp()
    for _ in range(3):
        q = q / q.sum(0)
        q = q / q.sum(1, keepdim=True)
    return q.view(logits.shape)


def test_the_losses_of_dinov2_equal_their_definitions() -> None:
    torch.manual_seed(0)
    preset = small_preset("tiny-dinov2")
    method = preset.method().double()
    student, teacher = method.student, method.teacher
    for network in (student, teacher):
        for parameter in network.parameters():
            parameter.data = torch.randn_like(parameter) / 4
    batch = drawn_batch(4, preset)
    where = batch.masks.where
    (part,) = method.parts(batch, 1, Clock(1, 10))
    losses = method(part)

    of_teacher = teacher.backbone(batch.global_crops.flatten(0, 1))
    targets = sinkhorn_knopp(teacher.heads["dino"](of_teacher.cls).unflatten(0, (2, 4)), 0.05)
    masked = where.flatten(0, 1)
    patch_targets = sinkhorn_knopp(teacher.heads["ibot"](of_teacher.patches[masked]), 0.05)
    of_student = student.backbone(batch.global_crops.flatten(0, 1), MaskedPatches(masked, student.mask_token))
    local = student.backbone(batch.local_crops.flatten(0, 1))
    logits = student.heads["dino"](torch.cat([of_student.cls, local.cls])).unflatten(0, (6, 4))
    pairs = [(g, v) for g in range(2) for v in range(6) if g != v]
    terms = [-(targets[g] * (logits[v] / 0.1).log_softmax(-1)).sum(-1).mean() for g, v in pairs]
    torch.testing.assert_close(losses["dino"], torch.stack(terms).mean())

    by_patch = -(patch_targets * (student.heads["ibot"](of_student.patches[masked]) / 0.1).log_softmax(-1)).sum(-1)
    crops = torch.arange(8).repeat_interleave(masked.sum(1))
    means = [by_patch[crops == crop].mean() for crop in range(8) if masked[crop].any()]
    torch.testing.assert_close(losses["ibot"], torch.stack(means).sum() / 8)

    koleo = 0.0
    for cls in F.normalize(of_student.cls, dim=-1).unflatten(0, (2, 4)):
        distances = torch.cdist(cls, cls, compute_mode="donot_use_mm_for_euclid_dist")
        koleo -= distances.fill_diagonal_(torch.inf).min(1).values.log().mean()
    torch.testing.assert_close(losses["koleo"], 0.1 * koleo, rtol=1e-6, atol=1e-8)


def test_the_loss_on_visible_patches_equals_its_definition() -> None:
    """Crop by crop: the mean over its masked patches, plus 0.75 times the mean over its visible ones."""
    torch.manual_seed(0)
    preset = small_preset("tiny-dinov2", "losses.ibot.visible=0.75", "losses.ibot.weight=0.5")
    method = preset.method().double()
    student, teacher = method.student, method.teacher
    for network in (student, teacher):
        for parameter in network.parameters():
            parameter.data = torch.randn_like(parameter) / 4
    batch = drawn_batch(4, preset)
    masked = batch.masks.where.flatten(0, 1)
    crops = [crop for crop in range(8) if masked[crop].any()]
    assert 0 < len(crops) < 8
    images = batch.global_crops.flatten(0, 1)
    of_teacher = teacher.heads["ibot"](teacher.backbone(images).patches[crops])
    targets = sinkhorn_knopp(of_teacher, 0.05)
    of_student = student.backbone(images, MaskedPatches(masked, student.mask_token)).patches[crops]
    by_patch = -(targets * (student.heads["ibot"](of_student) / 0.1).log_softmax(-1)).sum(-1)
    terms = [
        each[masked[crop]].mean() + 0.75 * each[~masked[crop]].mean()
        for crop, each in zip(crops, by_patch, strict=True)
    ]
    expected = 0.5 * torch.stack(terms).sum() / 8
    batch = method.prepare(batch)
    losses = method(*method.parts(batch, 1, Clock(1, 10)))
    torch.testing.assert_close(losses["ibot"], expected, rtol=1e-10, atol=0)
    in_parts = [method(part)["ibot"] for part in method.parts(batch, 2, Clock(1, 10))]
    torch.testing.assert_close(torch.stack(in_parts).mean(), expected, rtol=1e-10, atol=0)


def test_metrics_distinguish_both_kinds_of_collapse_from_learning() -> None:
    loss = load_preset("tiny-dino", ["heads.dino.prototypes=16"]).losses.dino.build(16)
    clock = Clock(1, 1)
    for logits, entropy, information, prototypes in (
        (torch.zeros(2, 8, 16), math.log(16), 0, 1),  # uniform targets
        (100 * torch.eye(16)[:1].expand(2, 8, 16), 0, 0, 1 / 16),  # the same prototype for all images
        (100 * torch.eye(16).view(2, 8, 16), 0, math.log(16), 1),  # another prototype for each image
    ):
        targets = loss.targets_for(Encoding(torch.empty(0), 2, {"dino": logits}), clock)
        metrics = loss.metrics(targets, torch.tensor(3.0), clock)
        assert {k: float(metrics[k]) for k in ("teacher_entropy", "information", "prototypes", "kl")} == pytest.approx(
            {"teacher_entropy": entropy, "information": information, "prototypes": prototypes, "kl": 3 - entropy},
            abs=1e-5,
        )


def test_a_skipped_step_does_not_change_the_teacher() -> None:
    method = load_preset("tiny-dino", ["heads.dino.prototypes=16"]).method()
    with torch.no_grad():
        for parameter in method.student.parameters():
            parameter.add_(1.0)
    before = {name: value.clone() for name, value in method.teacher.named_parameters()}
    method.after_step(Clock(1, 10), torch.tensor(False))
    assert all(torch.equal(value, before[name]) for name, value in method.teacher.named_parameters())
    method.after_step(Clock(1, 10), torch.tensor(True))
    assert not any(torch.equal(value, before[name]) for name, value in method.teacher.named_parameters())


def test_the_share_of_used_prototypes_spans_about_a_hundred_steps() -> None:
    loss = load_preset("tiny-dino", ["heads.dino.prototypes=16"]).losses.dino.build(16)
    clock, one, each = Clock(1, 1), 100 * torch.eye(16)[:1].expand(2, 8, 16), 100 * torch.eye(16).view(2, 8, 16)

    def share(logits: torch.Tensor, steps: int) -> float:
        for _ in range(steps):
            loss.targets.center.zero_()
            targets = loss.targets_for(Encoding(torch.empty(0), 2, {"dino": logits}), clock)
            metrics = loss.metrics(targets, torch.tensor(0.0), clock)
            loss.after_step()
        return float(metrics["prototypes"])

    assert share(one, 5) == pytest.approx(1 / 16)
    assert share(each, 1) < 0.2, "a single step changes little"
    assert share(each, 400) > 0.95
    assert 0.3 < share(one, 70) < 0.9, "after seventy steps, half of the average is new"
    assert share(one, 600) < 0.08
