from __future__ import annotations

from typing import Literal

import pytest
from pydantic import Field

from dinocli.core.config import Config, as_overrides, change
from dinocli.core.errors import DinoError


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
def test_errors_name_the_wrong_key_and_suggest_a_valid_one(change: dict, message: str, hint: str) -> None:
    with pytest.raises(DinoError) as error:
        Top.parse(GOOD | change, "preset x")
    assert error.value.message.startswith("preset x: ")
    assert message in error.value.message
    assert hint in error.value.hint


class Bound(Config):
    norm: float
    window: tuple[float, float] | tuple[tuple[float, float], ...] | None = None
    options: dict[str, bool | int | float | str] = {}


def test_a_config_is_frozen() -> None:
    bound = Bound(norm=1.0)
    with pytest.raises(ValueError, match="frozen"):
        bound.norm = 2.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), "nan", "Infinity"])
@pytest.mark.parametrize("key", ["norm", "window", "options"])
def test_numbers_that_are_not_finite_are_refused_at_any_depth(key: str, bad: float | str) -> None:
    for value in {"norm": [bad], "window": [(0, bad), ((0, 1), (bad, 1))], "options": [{"rate": bad}]}[key]:
        if key == "options" and isinstance(bad, str):
            continue  # a string is a valid option of timm
        with pytest.raises(DinoError, match=rf"{key}.* should be a finite number; it is .*{bad}"):
            Bound.parse({"norm": 1.0} | {key: value}, "preset x")


@pytest.mark.parametrize(
    "value", [{"norm": -1e39}, {"norm": 1, "window": (0, 1e300)}, {"norm": 1, "options": {"a": 1e39}}]
)
def test_numbers_beyond_float32_are_refused(value: dict) -> None:
    """Networks compute in float32, in which they would be infinite."""
    with pytest.raises(DinoError, match=r"should be at most 3.4e\+38 in magnitude"):
        Bound.parse({"norm": 1.0} | value, "preset x")
    assert Bound(norm=3.4e38).norm == 3.4e38


def test_python_values_as_overrides() -> None:
    given = {"a.b": 1, "c": {"d": "x y", "e": None}, "f": {"kind": "red", "depth": 0.5}, "g": [True, 2.5]}
    overrides = as_overrides(given)
    assert overrides == ["a.b=1", 'c.d="x y"', "c.e=none", 'f={kind="red", depth=0.5}', "g=[true, 2.5]"]
    data: dict[str, object] = {"c": {"e": 3}}
    for override in overrides:
        change(data, override)
    assert data == {"a": {"b": 1}, "c": {"d": "x y"}, "f": {"kind": "red", "depth": 0.5}, "g": [True, 2.5]}
