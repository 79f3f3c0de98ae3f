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
    """Compute the definition crop by crop and patch by patch, from [G, B, N, K] twice and [G, B, N]."""
    views, images, patches = where.shape
    terms = []
    for g in range(views):
        for b in range(images):
            by_patch = [
                -(targets[g, b, n] * torch.log_softmax(student[g, b, n] / 0.1, -1)).sum()
                for n in range(patches)
                if where[g, b, n]
            ]
            terms.append(torch.stack(by_patch).mean() if by_patch else torch.zeros((), dtype=student.dtype))
    return torch.stack(terms).mean()


def draw_mask(views: int, images: int, patches: int) -> torch.Tensor:
    """Mask patches of every other crop, in increasing number. [G, B, N], bool"""
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
@pytest.mark.parametrize("chunk_logits", [1, 40, 2**24])
def test_equals_the_definition(
    images: int, patches: int, prototypes: int, chunk_logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ibot, "CHUNK_LOGITS", chunk_logits)
    torch.manual_seed(0)
    where = draw_mask(2, images, patches)
    student = torch.randn(2, images, patches, prototypes, dtype=torch.float64, requires_grad=True)
    targets = (4 * torch.randn(2, images, patches, prototypes, dtype=torch.float64)).softmax(-1)
    rows, weights = rows_and_weights(where)
    loss = ibot_loss(student.flatten(0, 2)[rows], targets.flatten(0, 2)[rows], weights, 0.1)
    expected = loss_over_crops(student, targets, where)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    ours, theirs = (torch.autograd.grad(value, student)[0] for value in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


def test_the_module_computes_targets_weighted_loss_and_metrics() -> None:
    torch.manual_seed(0)
    where = draw_mask(2, 3, 8)
    masks = PatchMasks.of(where)
    teacher, student = torch.randn(len(masks.rows), 11), torch.randn(len(masks.rows), 11)
    loss_of = CONFIG.build(11)
    targets = loss_of.targets_for(Encoding(torch.empty(0), 2, {}, {"patches": teacher}), CLOCK)
    torch.testing.assert_close(targets, (teacher / 0.5).softmax(-1))
    loss = loss_of(Encoding(torch.empty(0), 2, {}, {"patches": student.clone()}), targets, masks)
    tables = [torch.zeros(2 * 3 * 8, 11) for _ in range(2)]
    for table, values in zip(tables, (student, targets), strict=True):
        table[masks.rows] = values
    expected = loss_over_crops(*(table.view(2, 3, 8, 11) for table in tables), where)
    torch.testing.assert_close(loss, 0.25 * expected)

    metrics = loss_of.metrics(targets, loss, CLOCK)
    entropies = torch.zeros(2 * 3 * 8)
    entropies[masks.rows] = -(targets * targets.log()).sum(-1)
    masked = [
        (crop[where.view(-1, 8)[i]]).mean()
        for i, crop in enumerate(entropies.view(-1, 8))
        if where.view(-1, 8)[i].any()
    ]
    torch.testing.assert_close(metrics["teacher_entropy"], torch.stack(masked).mean())
    torch.testing.assert_close(metrics["kl"], expected * 2 - torch.stack(masked).mean())
    assert metrics["temperature"] == 0.5

    loss_of.after_step()
    torch.testing.assert_close(loss_of.targets.center, 0.1 * teacher.mean(0))


def test_kl_is_zero_for_a_student_that_agrees_also_in_parts() -> None:
    """With several parts, weights are relative to a part, and the logged loss is the mean over the parts."""
    torch.manual_seed(0)
    where = draw_mask(2, 4, 8)
    halves = [PatchMasks.of(half) for half in where.chunk(2, 1)]
    logits = torch.randn(sum(len(half.rows) for half in halves), 11)
    loss_of = CONFIG.build(11)
    targets = loss_of.targets_for(Encoding(torch.empty(0), 2, {}, {"patches": logits}), CLOCK)
    sizes = [len(half.rows) for half in halves]
    assert sizes[0] != sizes[1]
    losses = [
        # Factor 0.2, the ratio of the temperatures 0.1 and 0.5.
        loss_of(Encoding(torch.empty(0), 2, {}, {"patches": (share * 0.2).clone()}), share_targets, half)
        for share, share_targets, half in zip(logits.split(sizes), targets.split(sizes), halves, strict=True)
    ]
    metrics = loss_of.metrics(targets, torch.stack(losses).mean(), CLOCK)
    assert metrics["teacher_entropy"] > 0.5
    assert abs(metrics["kl"]) < 1e-6
    loss_of.targets_for(Encoding(torch.empty(0), 2, {}, {"patches": logits}), CLOCK)
    assert not loss_of._weights, "the next step starts without weights"


def test_all_patches_count_equally_without_masks() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 5), torch.randn(6, 5)
    loss_of = CONFIG.build(5)
    targets = loss_of.targets_for(Encoding(torch.empty(0), 2, {}, {"patches": teacher}), CLOCK)
    loss = loss_of(Encoding(torch.empty(0), 2, {}, {"patches": student}), targets, None)
    torch.testing.assert_close(loss, 0.25 * -(targets * torch.log_softmax(student / 0.1, -1)).sum(-1).mean())


def test_a_batch_without_masked_patches_has_zero_loss() -> None:
    loss_of, nothing = CONFIG.build(5), torch.zeros(0, 5, requires_grad=True)
    masks = PatchMasks.of(torch.zeros(2, 1, 4, dtype=torch.bool))
    targets = loss_of.targets_for(Encoding(torch.empty(0), 2, {}, {"patches": nothing.detach()}), CLOCK)
    loss = loss_of(Encoding(torch.empty(0), 2, {}, {"patches": nothing.clone()}), targets, masks)
    loss.backward()
    metrics = loss_of.metrics(targets, loss.detach(), CLOCK)
    loss_of.after_step()
    assert (loss, metrics["teacher_entropy"], metrics["kl"]) == (0, 0, 0)
    assert metrics["information"].isnan(), "0 would be taken for collapse"
    assert loss_of.targets.center.isfinite().all()


def test_a_head_shared_with_class_tokens_gets_both_gradients() -> None:
    """Both losses overwrite logits of the same head with their gradients."""
    torch.manual_seed(0)
    options = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    backbone = BackboneConfig(name="vit_tiny_patch16_224", options=options, positions="dino").build(drop_path=False)
    head = HeadConfig(prototypes=11, hidden=16, bottleneck=8, layers=2, norm_last_layer=True).build(16)
    network = Network(backbone, {"both": head}, {"both": frozenset(["class", "patches"])}, masking=True).double()
    where = draw_mask(2, 3, 4)
    rows, weights = rows_and_weights(where)
    crops = [torch.randn(2, 3, 3, 16, 16, dtype=torch.float64), torch.randn(2, 3, 3, 8, 8, dtype=torch.float64)]
    of_class = torch.randn(2, 3, 11, dtype=torch.float64).softmax(-1)
    of_patches = torch.randn(len(rows), 11, dtype=torch.float64).softmax(-1)

    def gradients(loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return torch.autograd.grad(loss, [p for p in network.parameters() if p.requires_grad], allow_unused=True)

    encoding = network(crops, where, rows)
    loss = dino_loss(encoding.class_logits["both"], of_class, 0.1) + ibot_loss(
        encoding.masked_logits["both"], of_patches, weights, 0.1
    )
    ours = gradients(loss)
    encoding = network(crops, where, rows)
    log_p = (encoding.class_logits["both"] / 0.1).log_softmax(-1)
    pairs = [-(of_class[g] * log_p[v]).sum(-1).mean() for g in range(2) for v in range(4) if g != v]
    patches = -(weights * (of_patches * (encoding.masked_logits["both"] / 0.1).log_softmax(-1)).sum(-1)).sum()
    theirs = gradients(torch.stack(pairs).mean() + patches)
    assert all(found is not None for found in theirs)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_information_equals_its_definition_over_masked_crops() -> None:
    """Information is the entropy of the mean target minus the mean entropy; each masked crop counts equally."""
    torch.manual_seed(0)
    where = draw_mask(2, 3, 8)
    masks = PatchMasks.of(where)
    crops = [i for i in range(6) if where.view(6, 8)[i].any()]
    assert len({int(where.view(6, 8)[i].sum()) for i in crops}) == len(crops), (
        "crops have different numbers of masked patches"
    )
    loss_of = CONFIG.build(11)

    def measure(teacher: torch.Tensor) -> tuple[torch.Tensor, float]:
        targets = loss_of.targets_for(Encoding(torch.empty(0), 2, {}, {"patches": teacher}), CLOCK)
        loss = loss_of(Encoding(torch.empty(0), 2, {}, {"patches": torch.randn_like(teacher)}), targets, masks)
        return targets, float(loss_of.metrics(targets, loss, CLOCK)["information"])

    targets, information = measure(4 * torch.randn(len(masks.rows), 11))
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
    _, nothing = measure((4 * torch.randn(11)).expand(len(masks.rows), 11))
    assert abs(nothing) < 1e-6, "all patches have the same target"
    _, everything = measure(1000 * torch.eye(11)[torch.arange(len(masks.rows)) % 11])
    assert everything > 1.5, "each patch has another target"
