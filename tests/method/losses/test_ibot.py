from __future__ import annotations

import pytest
import torch

from dinocli.data.views.masking import PatchMasks
from dinocli.engine.schedules import Clock, Constant
from dinocli.method.losses import ibot
from dinocli.method.losses.dino import dino_loss
from dinocli.method.losses.ibot import IbotLossConfig, ibot_loss
from dinocli.method.losses.targets import CenteringConfig
from dinocli.models.architecture import BackboneConfig
from dinocli.models.head import HeadConfig
from dinocli.models.network import Encoding, Network

CENTERING = CenteringConfig(kind="centering", momentum=0.9, temperature=Constant(kind="constant", value=0.5))
CONFIG = IbotLossConfig(weight=0.25, head="patches", student_temperature=0.1, targets=CENTERING)
CLOCK = Clock(1, 1)


def loss_over_crops(student: torch.Tensor, targets: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """The definition, crop by crop and patch by patch. [G, B, N, K] twice, [G, B, N]"""
    views, images, patches = where.shape
    terms = []
    for g in range(views):
        for b in range(images):
            hidden = [
                -(targets[g, b, n] * torch.log_softmax(student[g, b, n] / 0.1, -1)).sum()
                for n in range(patches)
                if where[g, b, n]
            ]
            terms.append(torch.stack(hidden).mean() if hidden else torch.zeros((), dtype=student.dtype))
    return torch.stack(terms).mean()


def hidden(views: int, images: int, patches: int) -> torch.Tensor:
    """Every other crop has a mask, the first of them the smallest. [G, B, N], bool"""
    where = torch.zeros(views, images, patches, dtype=torch.bool)
    for i in range(0, views * images, 2):
        where.view(-1, patches)[i, torch.randperm(patches)[: 1 + i % patches]] = True
    return where


def rows_and_weights(where: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    counts = where.sum(-1, keepdim=True).expand_as(where)
    rows = where.flatten().nonzero()[:, 0]
    return rows, 1 / counts.flatten()[rows].double() / (where.shape[0] * where.shape[1])


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("patches", [1, 4, 9])
@pytest.mark.parametrize("prototypes", [2, 17])
@pytest.mark.parametrize("at_once", [1, 40, 2**24])
def test_equals_the_definition(
    images: int, patches: int, prototypes: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ibot, "_CHUNK_LOGITS", at_once)
    torch.manual_seed(0)
    where = hidden(2, images, patches)
    student = torch.randn(2, images, patches, prototypes, dtype=torch.float64, requires_grad=True)
    targets = (4 * torch.randn(2, images, patches, prototypes, dtype=torch.float64)).softmax(-1)
    rows, weights = rows_and_weights(where)
    loss = ibot_loss(student.flatten(0, 2)[rows], targets.flatten(0, 2)[rows], weights, 0.1)
    expected = loss_over_crops(student, targets, where)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    ours, theirs = (torch.autograd.grad(value, student)[0] for value in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


def test_the_module_reads_its_head_aims_weighs_and_tells() -> None:
    torch.manual_seed(0)
    where = hidden(2, 3, 8)
    masks = PatchMasks.of(where)
    teacher, student = torch.randn(len(masks.rows), 11), torch.randn(len(masks.rows), 11)
    loss_of = CONFIG.build(11)
    targets = loss_of.targets_for(Encoding(torch.empty(0), 2, {}, {"patches": teacher}), CLOCK)
    torch.testing.assert_close(targets, (teacher / 0.5).softmax(-1))
    loss = loss_of(Encoding(torch.empty(0), 2, {}, {"patches": student.clone()}), targets, masks)
    every = [torch.zeros(2 * 3 * 8, 11) for _ in range(2)]
    for all_, some in zip(every, (student, targets), strict=True):
        all_[masks.rows] = some
    expected = loss_over_crops(*(x.view(2, 3, 8, 11) for x in every), where)
    torch.testing.assert_close(loss, 0.25 * expected)

    told = loss_of.metrics(targets, loss, CLOCK)
    entropies = torch.zeros(2 * 3 * 8)
    entropies[masks.rows] = -(targets * targets.log()).sum(-1)
    masked = [
        (crop[where.view(-1, 8)[i]]).mean()
        for i, crop in enumerate(entropies.view(-1, 8))
        if where.view(-1, 8)[i].any()
    ]
    torch.testing.assert_close(told["teacher_entropy"], torch.stack(masked).mean())
    torch.testing.assert_close(told["kl"], expected * 2 - torch.stack(masked).mean())
    assert told["temperature"] == 0.5

    loss_of.after_step()
    torch.testing.assert_close(loss_of.targets.center, 0.1 * teacher.mean(0))


def test_a_student_that_agrees_has_no_divergence_left_in_parts_too() -> None:
    """In parts the weights are those of a part, and what is logged is the mean of the parts' losses."""
    torch.manual_seed(0)
    where = hidden(2, 4, 8)
    halves = [PatchMasks.of(half) for half in where.chunk(2, 1)]
    agrees = torch.randn(sum(len(half.rows) for half in halves), 11)
    loss_of = CONFIG.build(11)
    targets = loss_of.targets_for(Encoding(torch.empty(0), 2, {}, {"patches": agrees}), CLOCK)
    sizes = [len(half.rows) for half in halves]
    assert sizes[0] != sizes[1]
    losses = [
        loss_of(Encoding(torch.empty(0), 2, {}, {"patches": (said * 0.2).clone()}), aimed, half)  # 0.1 over 0.5
        for said, aimed, half in zip(agrees.split(sizes), targets.split(sizes), halves, strict=True)
    ]
    told = loss_of.metrics(targets, torch.stack(losses).mean(), CLOCK)
    assert told["teacher_entropy"] > 0.5
    assert abs(told["kl"]) < 1e-6
    loss_of.targets_for(Encoding(torch.empty(0), 2, {}, {"patches": agrees}), CLOCK)
    assert not loss_of._weights, "a step that was watched leaves nothing for the next"


def test_without_masks_all_patches_count_alike() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 5), torch.randn(6, 5)
    loss_of = CONFIG.build(5)
    targets = loss_of.targets_for(Encoding(torch.empty(0), 2, {}, {"patches": teacher}), CLOCK)
    loss = loss_of(Encoding(torch.empty(0), 2, {}, {"patches": student}), targets, None)
    torch.testing.assert_close(loss, 0.25 * -(targets * torch.log_softmax(student / 0.1, -1)).sum(-1).mean())


def test_a_batch_without_hidden_patches_costs_nothing() -> None:
    loss_of, nothing = CONFIG.build(5), torch.zeros(0, 5, requires_grad=True)
    masks = PatchMasks.of(torch.zeros(2, 1, 4, dtype=torch.bool))
    targets = loss_of.targets_for(Encoding(torch.empty(0), 2, {}, {"patches": nothing.detach()}), CLOCK)
    loss = loss_of(Encoding(torch.empty(0), 2, {}, {"patches": nothing.clone()}), targets, masks)
    loss.backward()
    told = loss_of.metrics(targets, loss.detach(), CLOCK)
    loss_of.after_step()
    assert (loss, told["teacher_entropy"], told["kl"]) == (0, 0, 0)
    assert told["information"].isnan(), "and is no collapse"
    assert loss_of.targets.center.isfinite().all()


def test_a_head_shared_with_class_tokens_gets_both_gradients() -> None:
    """Both losses write their gradients over what it has said."""
    torch.manual_seed(0)
    options = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    backbone = BackboneConfig(name="vit_tiny_patch16_224", options=options, positions="dino").build(drop_path=False)
    head = HeadConfig(prototypes=11, hidden=16, bottleneck=8, layers=2, norm_last_layer=True).build(16)
    network = Network(backbone, {"both": head}, {"both": frozenset(["class", "patches"])}, masking=True).double()
    where = hidden(2, 3, 4)
    rows, weights = rows_and_weights(where)
    crops = [torch.randn(2, 3, 3, 16, 16, dtype=torch.float64), torch.randn(2, 3, 3, 8, 8, dtype=torch.float64)]
    of_class = torch.randn(2, 3, 11, dtype=torch.float64).softmax(-1)
    of_patches = torch.randn(len(rows), 11, dtype=torch.float64).softmax(-1)

    def gradients(loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return torch.autograd.grad(loss, [p for p in network.parameters() if p.requires_grad], allow_unused=True)

    said = network(crops, where, rows)
    loss = dino_loss(said.class_logits["both"], of_class, 0.1) + ibot_loss(
        said.masked_logits["both"], of_patches, weights, 0.1
    )
    ours = gradients(loss)
    said = network(crops, where, rows)
    log_p = (said.class_logits["both"] / 0.1).log_softmax(-1)
    pairs = [-(of_class[g] * log_p[v]).sum(-1).mean() for g in range(2) for v in range(4) if g != v]
    patches = -(weights * (of_patches * (said.masked_logits["both"] / 0.1).log_softmax(-1)).sum(-1)).sum()
    theirs = gradients(torch.stack(pairs).mean() + patches)
    assert all(found is not None for found in theirs)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_information_is_what_a_hidden_patchs_targets_tell_of_it() -> None:
    """The entropy of the mean target less the mean entropy, where each masked crop counts alike."""
    torch.manual_seed(0)
    where = hidden(2, 3, 8)
    masks = PatchMasks.of(where)
    crops = [i for i in range(6) if where.view(6, 8)[i].any()]
    assert len({int(where.view(6, 8)[i].sum()) for i in crops}) == len(crops), "crops hide different numbers"
    loss_of = CONFIG.build(11)

    def told(teacher: torch.Tensor) -> tuple[torch.Tensor, float]:
        targets = loss_of.targets_for(Encoding(torch.empty(0), 2, {}, {"patches": teacher}), CLOCK)
        loss = loss_of(Encoding(torch.empty(0), 2, {}, {"patches": torch.randn_like(teacher)}), targets, masks)
        return targets, float(loss_of.metrics(targets, loss, CLOCK)["information"])

    targets, information = told(4 * torch.randn(len(masks.rows), 11))
    table = torch.zeros(6 * 8, 11)
    table[masks.rows] = targets
    means, entropies = [], []
    for i in crops:
        of_crop = table.view(6, 8, 11)[i][where.view(6, 8)[i]]
        means.append(of_crop.mean(0))
        entropies.append(torch.stack([-(p * p.log()).sum() for p in of_crop]).mean())
    mean = torch.stack(means).mean(0)
    assert information == pytest.approx(float(-(mean * mean.log()).sum() - torch.stack(entropies).mean()), rel=1e-5)
    assert information > 0.5
    _, nothing = told((4 * torch.randn(11)).expand(len(masks.rows), 11))
    assert abs(nothing) < 1e-6, "all patches get the same"
    _, everything = told(1000 * torch.eye(11)[torch.arange(len(masks.rows)) % 11])
    assert everything > 1.5, "each gets its own"
