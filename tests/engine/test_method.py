from __future__ import annotations

import pytest

from dinocli.engine.method import Method, ParamGroup


def test_a_method_must_implement_forward_and_param_groups() -> None:
    with pytest.raises(TypeError, match=r"forward.*param_groups"):
        Method()


def test_a_parameter_group_has_no_special_settings_by_default() -> None:
    group = ParamGroup([])
    assert (group.decay, group.lr_scale, group.frozen_epochs) == (True, 1.0, 0)
