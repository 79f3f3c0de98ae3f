"""Settings: the values of a stored preset by their keys, and which of them differ from the shipped one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from dinocli import shipped
from dinocli.errors import DinoError
from dinocli.preset import load_preset

_SAME = ("recipe", "source", "command")


def flat(data: object, above: str = "") -> Iterator[tuple[str, str | None]]:
    """Values by their key below a table; a schedule, or another table of a kind with plain values, is one value."""
    if not isinstance(data, dict):
        yield above, None if data is None else data if isinstance(data, str) else json.dumps(data)
    elif above and "kind" in data and not any(isinstance(value, dict) for value in data.values()):
        named = [f"{key} {json.dumps(value)}" for key, value in data.items() if key != "kind" and value is not None]
        yield above, ", ".join([str(data["kind"]), *named])
    else:
        for key, value in data.items():
            yield from flat(value, f"{above}.{key}" if above else str(key))


def shipped_as(preset: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The shipped preset that tells the same about itself, and what it says; nothing for one of the user's own.

    Cost and figures are no part of that: they are measured anew between versions.
    """
    about = preset.get("about")
    for name in shipped.names():
        try:
            found = load_preset(name).model_dump(mode="json")
        except DinoError:
            continue
        if isinstance(about, dict) and all(found["about"][key] == about.get(key) for key in _SAME):
            return name, found
    return "", {}


def changes(preset: dict[str, Any], shipped: dict[str, Any]) -> dict[str, tuple[str | None, str | None]]:
    """What two presets set differently, by key: the first one's value, and the second's."""
    now, then = (
        {key: value for key, value in flat(each) if not key.startswith("about.")} for each in (preset, shipped)
    )
    keys = dict.fromkeys([*now, *then])
    return {key: (now.get(key), then.get(key)) for key in keys if now.get(key) != then.get(key)}
