"""Settings: the values of a stored preset by key, and their differences from the shipped preset."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from typing import Any

from dinocli.core.errors import DinoError
from dinocli.method import shipped
from dinocli.method.preset import load_preset

_COMPARED = ("recipe", "source", "command")  # keys of `about` that identify a shipped preset


def flat(data: object, above: str = "") -> Iterator[tuple[str, str | None]]:
    """Yield each setting as its full key and its value as text; None stays None.

    A table with a `kind` and only plain values, such as a schedule, is one setting.
    """
    if not isinstance(data, dict):
        yield above, None if data is None else data if isinstance(data, str) else json.dumps(data)
    elif above and "kind" in data and not any(isinstance(value, dict) for value in data.values()):
        named = [f"{key} {json.dumps(value)}" for key, value in data.items() if key != "kind" and value is not None]
        yield above, ", ".join([str(data["kind"]), *named])
    else:
        for key, value in data.items():
            yield from flat(value, f"{above}.{key}" if above else str(key))


def description_of(preset: dict[str, Any]) -> tuple[str, ...]:
    """Return the description of a preset, which only a shipped preset and the runs with it have in common.

    Cost and expected results are not part of it, because they are measured anew between versions.
    """
    about = preset.get("about")
    return tuple(str(about.get(key)) for key in _COMPARED) if isinstance(about, dict) else ()


def shipped_as(preset: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the name and the values of the shipped preset with the same description; empty for a user's own preset."""
    for name in shipped.names():
        if description_of(tomllib.loads(shipped.text(name))) == description_of(preset):
            try:
                return name, load_preset(name).model_dump(mode="json")
            except DinoError:
                break
    return "", {}


def changes(preset: dict[str, Any], shipped: dict[str, Any]) -> dict[str, tuple[str | None, str | None]]:
    """Return the settings that differ between two presets, by key: the value in the first, and in the second."""
    first, second = (
        {key: value for key, value in flat(each) if not key.startswith("about.")} for each in (preset, shipped)
    )
    keys = dict.fromkeys([*first, *second])
    return {key: (first.get(key), second.get(key)) for key in keys if first.get(key) != second.get(key)}
