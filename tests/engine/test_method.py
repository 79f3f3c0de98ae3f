from __future__ import annotations

import pytest

from dinocli.engine.method import Method, ParamGroup


def test_a_method_must_say_its_losses_and_its_parameters() -> None:
    with pytest.raises(TypeError, match=r"forward.*param_groups"):
        Method()


def test_a_group_is_the_identity_unless_told() -> None:
    group = ParamGroup([])
    assert (group.decay, group.lr_scale, group.frozen_epochs) == (True, 1.0, 0)
