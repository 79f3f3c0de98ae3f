"""Settings: the values of a stored preset by key, and their differences from the shipped preset."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from dinocli.core.errors import DinoError
from dinocli.method import shipped
from dinocli.method.preset import load_preset

_SAME = ("recipe", "source", "command")


def flat(data: object, above: str = "") -> Iterator[tuple[str, str | None]]:
    """Yield values by their key below a table; a table with a `kind` and plain values, as a schedule, is one value."""
    if not isinstance(data, dict):
        yield above, None if data is None else data if isinstance(data, str) else json.dumps(data)
    elif above and "kind" in data and not any(isinstance(value, dict) for value in data.values()):
        named = [f"{key} {json.dumps(value)}" for key, value in data.items() if key != "kind" and value is not None]
        yield above, ", ".join([str(data["kind"]), *named])
    else:
        for key, value in data.items():
            yield from flat(value, f"{above}.{key}" if above else str(key))


def shipped_as(preset: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the shipped preset with the same description, and its values; empty for a user's own preset.

    Cost and expected figures are not compared: they are measured again between versions.
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
    """Return the settings that differ between two presets, by key: the first one's value, and the second's."""
    now, then = (
        {key: value for key, value in flat(each) if not key.startswith("about.")} for each in (preset, shipped)
    )
    keys = dict.fromkeys([*now, *then])
    return {key: (now.get(key), then.get(key)) for key in keys if now.get(key) != then.get(key)}
