from __future__ import annotations

from typing import Literal

import pytest
from pydantic import Field

from dinocli.config import Config
from dinocli.errors import DinoError


class Red(Config):
    kind: Literal["red"]
    depth: float = Field(gt=0)


class Blue(Config):
    kind: Literal["blue"]
    chill: float


class Top(Config):
    size: int
    paint: Red | Blue = Field(discriminator="kind")
    rooms: dict[str, Blue] = {}


GOOD = {"size": 3, "paint": {"kind": "red", "depth": 1.0}}


@pytest.mark.parametrize(
    ("change", "message", "hint"),
    [
        ({"sise": 3}, "no key sise", "did you mean size?"),
        ({"paint": {"kind": "red", "depht": 1.0, "depth": 1.0}}, "no key paint.depht", "paint.depth"),
        ({"paint": {"kind": "blue", "chil": 1.0, "chill": 1.0}}, "no key paint.chil", "paint.chill"),
        (
            {"rooms": {"hall": {"kind": "blue", "chill": 1, "chilly": 2}}},
            "no key rooms.hall.chilly",
            "rooms.hall.chill",
        ),
        ({"paint": {"kind": "red"}}, "paint.depth is missing", "--set paint.depth=VALUE"),
        (
            {"paint": {"kind": "red", "depth": -1}},
            "paint.depth should be greater than 0; it is -1",
            "--set paint.depth=",
        ),
        ({"size": "big"}, "size should be a valid integer", "--set size="),
        ({"paint": {"kind": "green"}}, "paint", "--set paint"),
    ],
)
def test_a_mistake_names_where_it_is(change: dict, message: str, hint: str) -> None:
    with pytest.raises(DinoError) as error:
        Top.parse(GOOD | change, "preset x")
    assert error.value.message.startswith("preset x: ")
    assert message in error.value.message
    assert hint in error.value.hint


def test_a_config_is_frozen_and_keeps_infinity() -> None:
    class Bound(Config):
        norm: float

    bound = Bound(norm=float("inf"))
    assert Bound.model_validate_json(bound.model_dump_json()) == bound
    with pytest.raises(ValueError, match="frozen"):
        bound.norm = 1.0
