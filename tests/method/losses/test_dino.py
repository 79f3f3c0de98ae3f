from __future__ import annotations

import itertools

import pytest
import torch
from conftest import PRECISIONS, assert_original

from dinocli.engine.schedules import Clock, LinearByEpoch
from dinocli.method.losses.dino import DinoLossConfig, dino_loss
from dinocli.method.losses.targets import CenteringConfig
from dinocli.models.network import Encoding


def loss_over_pairs(student: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
    """Equation 3 of the paper, with one term per pair of views."""
    terms = []
    for g, v in itertools.product(range(len(targets)), range(len(student))):
        if g != v:
            log_p = torch.log_softmax(student[v] / temperature, -1)
            terms.append(torch.stack([-(targets[g, b] * log_p[b]).sum() for b in range(student.shape[1])]).mean())
    return torch.stack(terms).mean()


@pytest.mark.parametrize("views", [2, 3, 10])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("prototypes", [2, 17])
def test_equals_the_definition(views: int, batch: int, prototypes: int) -> None:
    torch.manual_seed(0)
    student = torch.randn(views, batch, prototypes, dtype=torch.float64, requires_grad=True)
    targets = torch.randn(2, batch, prototypes, dtype=torch.float64).softmax(-1)
    loss, expected = dino_loss(student.clone(), targets, 0.1), loss_over_pairs(student, targets, 0.1)
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (loss, expected)), rtol=1e-12, atol=1e-15)


def test_the_gradient_overwrites_the_logits_and_nothing_else_is_saved() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 3, 17, requires_grad=True).clone()
    address = logits.data_ptr()
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = dino_loss(logits, torch.randn(2, 3, 17).softmax(-1), 0.1)
    assert not saved
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.data_ptr() == address


def test_logits_without_a_gradient_are_not_changed() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 3, 17)
    before = logits.clone()
    dino_loss(logits, torch.randn(2, 3, 17).softmax(-1), 0.1)
    assert torch.equal(logits, before)


def test_a_single_global_view_has_no_target() -> None:
    torch.manual_seed(0)
    student = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.randn(1, 2, 5, dtype=torch.float64).softmax(-1)
    loss, expected = dino_loss(student.clone(), targets, 0.1), loss_over_pairs(student, targets, 0.1)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (loss, expected)))


def test_other_operations_that_saved_the_logits_raise_an_error() -> None:
    student = torch.randn(3, 2, 5, requires_grad=True)
    logits = student.clone()
    squared = logits.square()  # saves the logits for its gradient
    loss = dino_loss(logits, torch.randn(2, 2, 5).softmax(-1), 0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + squared.sum()).backward()


def test_a_second_gradient_is_refused() -> None:
    logits = torch.randn(3, 2, 5, requires_grad=True).clone()
    loss = dino_loss(logits, torch.randn(2, 2, 5).softmax(-1), 0.1)
    torch.autograd.grad(loss, logits, retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        torch.autograd.grad(loss, logits)


@PRECISIONS
@pytest.mark.parametrize("case", ["twocrop_f64", "multicrop_2p4_f64"])
def test_loss_gradient_and_center_equal_the_originals(original, case: str, dtype: torch.dtype) -> None:
    made = original.made["loss"][case]
    temperature = LinearByEpoch(
        kind="linear_by_epoch",
        start=made["warmup_teacher_temp"],
        end=made["teacher_temp"],
        epochs=made["warmup_teacher_temp_epochs"],
    )
    targets = CenteringConfig(kind="centering", momentum=made["center_momentum"], temperature=temperature)
    config = DinoLossConfig(weight=1.0, head="dino", student_temperature=made["student_temp"], targets=targets)
    loss_of = config.build(made["out_dim"]).to(dtype)
    for call in made["calls"]:
        name = f"loss/{case}/call{call['call']}"
        loss_of.targets.center.copy_(original[f"{name}/center_before"][0])
        student = original[f"{name}/student"].to(dtype).unflatten(0, (made["ncrops"], -1)).requires_grad_()
        teacher = original[f"{name}/teacher"].to(dtype).unflatten(0, (2, -1))
        of_teacher, of_student = (
            Encoding(torch.empty(0), 2, {"dino": logits}) for logits in (teacher, student.clone())
        )
        clock = Clock(1, made["nepochs"], call["epoch"])
        loss = loss_of(of_student, loss_of.targets_for(of_teacher, clock), None)
        loss.backward()
        loss_of.after_step()
        assert_original(loss, original[f"{name}/loss"], name)
        assert_original(student.grad.flatten(0, 1), original[f"{name}/dloss_dstudent"], name)
        assert_original(loss_of.targets.center, original[f"{name}/center_after"][0], name)


def test_the_loss_of_a_student_that_agrees_is_the_entropy_of_the_targets() -> None:
    torch.manual_seed(1)
    logits = torch.randn(1, 4, 8, dtype=torch.float64)
    targets = (logits / 0.1).softmax(-1).expand(2, -1, -1)
    entropy = -(targets[0] * targets[0].log()).sum(-1).mean()
    torch.testing.assert_close(dino_loss(logits.expand(2, -1, -1), targets, 0.1), entropy)


def test_the_loss_of_bfloat16_logits_is_float32() -> None:
    targets = torch.full((2, 1, 4), 0.25)
    assert dino_loss(torch.zeros(2, 1, 4, dtype=torch.bfloat16), targets, 0.1).dtype == torch.float32


def class_token_loss_of_dinov2(student: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
    """Global and local term of dinov2@b8931f7 train/ssl_meta_arch.py, each weighted by its share of the pairs."""

    def between(view: torch.Tensor, target: torch.Tensor) -> torch.Tensor:  # [K], [K] -> []
        return -(target * torch.log_softmax(view / temperature, -1)).sum()

    globals_, locals_, images = student[:2], student[2:], range(student.shape[1])
    pairs = 2 + 2 * len(locals_)
    # Both global views as one batch, against the teacher's with the two views swapped.
    of_globals = [between(globals_[v, b], targets[1 - v, b]) for v in (0, 1) for b in images]
    of_locals = [between(view[b], target[b]) for view in locals_ for target in targets for b in images]
    return torch.stack(of_globals).mean() * 2 / pairs + torch.stack(of_locals).mean() * 2 * len(locals_) / pairs


@pytest.mark.parametrize("locals_", [1, 3, 8])
def test_the_loss_equals_the_formulas_of_dino_and_of_dinov2(locals_: int) -> None:
    """DINO's mean over pairs of views (18 pairs with 8 local views) equals DINOv2's weighted sum of two terms."""
    torch.manual_seed(0)
    student = 4 * torch.randn(2 + locals_, 3, 17, dtype=torch.float64)
    targets = (4 * torch.randn(2, 3, 17, dtype=torch.float64)).softmax(-1)
    first, second = loss_over_pairs(student, targets, 0.1), class_token_loss_of_dinov2(student, targets, 0.1)
    torch.testing.assert_close(first, second, rtol=1e-13, atol=0)
    torch.testing.assert_close(dino_loss(student, targets, 0.1), second, rtol=1e-13, atol=0)


def test_autocast_does_not_reduce_the_precision_of_the_loss() -> None:
    torch.manual_seed(0)
    student, targets = torch.randn(3, 2, 500), torch.randn(2, 2, 500).softmax(-1)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = dino_loss(student, targets, 0.1)
    assert under_autocast.equal(dino_loss(student, targets, 0.1))
