from __future__ import annotations

import pytest
import torch

from dinocli.data.loader.batch import Batch
from dinocli.engine.schedules import Clock
from dinocli.engine.trainer import Trainer
from dinocli.method.classification import Classification, LabelledPart
from dinocli.method.preset import Preset, load_preset

CLOCK = Clock(2, 4)
SMALL = (
    "backbone.options={img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2}",
    "backbone.drop_path=0",
    "views.global_1.size=16",
    "losses.labels={classes=3}",
    "backbone.learning.frozen_epochs=0",
    "training.batch_size=6",
    "training.precision=float32",
)
LABELS = torch.tensor([0, 1, 2, 2, 1, 0, 1])


def small(*more: str) -> Preset:
    return load_preset("finetune", [*SMALL, *more])


def make(*more: str) -> Classification:
    torch.manual_seed(0)
    return small(*more).label_method(LABELS)


def a_batch() -> Batch:
    torch.manual_seed(1)
    return Batch(torch.randn(1, 6, 3, 16, 16), None, torch.tensor([6, 0, 3, 3, 1, 5]))


def parts_of(method: Classification, batch: Batch, count: int = 1) -> list[LabelledPart]:
    return method.parts(method.prepare(batch), count, CLOCK)


def test_targets_are_the_labels_of_the_shown_images() -> None:
    (part,) = parts_of(make(), a_batch())
    assert part.targets.argmax(1).tolist() == LABELS[a_batch().rows].tolist()
    assert part.targets.sum().item() == 6


def test_several_parts_give_the_gradient_of_the_whole_batch() -> None:
    found = []
    for count in (1, 3):
        method = make()
        parts = parts_of(method, a_batch(), count)
        (sum(method(part)["labels"] for part in parts) / count).backward()
        found.append([p.grad for p in method.student.parameters() if p.grad is not None])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
def test_mixed_images_have_mixed_targets(mix: str) -> None:
    method = make(f"losses.labels.{mix}=1.0")
    batch = a_batch()
    (part,) = parts_of(method, batch)
    torch.testing.assert_close(part.targets.sum(1), torch.ones(6))
    rolled = batch.global_crops.roll(1, 1)
    own = torch.nn.functional.one_hot(LABELS[batch.rows], 3).float()
    if mix == "mixup":
        share = ((part.batch.global_crops - rolled) / (batch.global_crops - rolled)).median().item()
    else:
        share = (part.batch.global_crops == batch.global_crops).float().mean().item()
    torch.testing.assert_close(part.targets, share * own + (1 - share) * own.roll(1, 0), rtol=1e-3, atol=1e-3)


def test_the_average_follows_the_student_and_both_learn() -> None:
    preset = small("teacher.momentum={kind='constant', value=0.5}", "optimizer.lr={kind='constant', value=1.0}")
    method = make("teacher.momentum={kind='constant', value=0.5}")
    trainer = Trainer(method, preset.optimizer, CLOCK, batch_size=6)
    losses = [trainer.step(a_batch())["loss"].item() for _ in range(8)]
    assert losses[0] == pytest.approx(torch.log(torch.tensor(3.0)).item()), "a fresh classifier is undecided"
    assert losses[-1] < 0.5 * losses[0]
    with torch.no_grad():
        logits = method.average.eval()([a_batch().global_crops]).class_logits["labels"][0]
    assert (logits.argmax(1) == LABELS[a_batch().rows]).float().mean() > 0.6


def test_a_convolutional_backbone_learns_at_lower_rates_than_the_classifier() -> None:
    method = make("backbone={name='resnet18', learning={layer_decay=0.75}}", "views.global_1.size=32")
    names = {p: name for name, p in method.student.named_parameters()}
    rates = {names[p]: group.lr_scale for group in method.param_groups() for p in group.params}
    assert rates["heads.labels.linear.weight"] == rates["heads.labels.linear.bias"] == 1
    assert rates["backbone.model.layer4.0.conv1.weight"] == 0.75
    assert rates["backbone.model.conv1.weight"] == pytest.approx(0.75**5)


def test_a_frozen_epoch_moves_the_classifier_alone() -> None:
    preset = small("backbone.learning.frozen_epochs=1")
    torch.manual_seed(0)
    method = preset.label_method(LABELS)
    before = {name: p.clone() for name, p in method.student.named_parameters()}
    Trainer(method, preset.optimizer, CLOCK, batch_size=6).step(a_batch())
    moved = {name for name, p in method.student.named_parameters() if not torch.equal(p, before[name])}
    assert moved <= {"heads.labels.linear.weight", "heads.labels.linear.bias"}
