from __future__ import annotations

import tomllib

import pytest

from dinocli import shipped
from dinocli.errors import DinoError


def test_names_and_texts() -> None:
    assert {"tiny", "vits16", "vits8", "vitb16", "vitb8", "resnet50"} <= set(shipped.names())
    for name in shipped.names():
        about = tomllib.loads(shipped.text(name))["about"]
        assert all(about[key] for key in ("recipe", "source", "command", "cost", "expected")), name


def test_an_unknown_name_is_said_with_the_nearest() -> None:
    with pytest.raises(DinoError) as error:
        shipped.text("resnet5")
    assert "resnet50" in error.value.hint
