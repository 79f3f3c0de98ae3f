from __future__ import annotations

import torch

from dinocli.losses.targets import CenteringConfig
from dinocli.schedules import Clock, Constant

CONFIG = CenteringConfig(kind="centering", momentum=0.75, temperature=Constant(kind="constant", value=0.05))


def test_targets_are_distributions_and_the_center_moves_only_when_told() -> None:
    rule = CONFIG.build(6)
    logits = torch.randn(2, 3, 6)
    targets = rule(logits, Clock(1, 1))
    torch.testing.assert_close(targets.sum(-1), torch.ones(2, 3))
    assert rule.center.eq(0).all()
    rule.update()
    torch.testing.assert_close(rule.center, 0.25 * logits.mean((0, 1)))
    before = rule.center.clone()
    rule.update()
    assert rule.center.equal(before), "a step that saw nothing moves nothing"


def test_a_center_takes_away_what_all_images_share() -> None:
    rule = CONFIG.build(6)
    offset = torch.tensor([5.0, 0, 0, 0, 0, 0])
    for _ in range(50):
        rule(torch.zeros(2, 3, 6) + offset, Clock(1, 1))
        rule.update()
    torch.testing.assert_close(
        rule(torch.zeros(2, 3, 6) + offset, Clock(1, 1)), torch.full((2, 3, 6), 1 / 6), atol=1e-3, rtol=0
    )
