from __future__ import annotations

import torch

from dinocli.method.losses.labels import LabelsLossConfig, label_loss


def test_the_loss_of_one_class_equals_its_definition() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 4)
    labels = torch.tensor([0, 3, 1, 1, 2, 0])
    targets = LabelsLossConfig(classes=4, smoothing=0.2).smooth(labels)
    torch.testing.assert_close(targets.sum(1), torch.ones(6))
    logs = logits.double() - logits.double().exp().sum(1, keepdim=True).log()
    expected = -torch.stack(
        [0.8 * row[label] + 0.2 * row.mean() for row, label in zip(logs, labels, strict=True)]
    ).mean()
    torch.testing.assert_close(label_loss(logits, targets, several=False).double(), expected)


def test_the_loss_of_several_classes_equals_its_definition() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 4)
    labels = torch.tensor([[1.0, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    targets = LabelsLossConfig(classes=4, several=True, smoothing=0.1).smooth(labels)
    torch.testing.assert_close(targets, labels * 0.9 + 0.05)
    share = 1 / (1 + (-logits.double()).exp())
    expected = -(targets * share.log() + (1 - targets) * (1 - share).log()).mean()
    torch.testing.assert_close(label_loss(logits, targets, several=True).double(), expected, rtol=1e-6, atol=1e-7)
