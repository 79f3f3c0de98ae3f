"""Config: what every table of a preset is made of."""

from __future__ import annotations

import tomllib
from typing import Any, Self, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from dinocli.errors import DinoError, nearest

_DEEPEST = 32  # levels of nested tables and lists; a preset has about 6


class Config(BaseModel):
    """Frozen settings in which an unknown key is an error.

    Fields that define a recipe have no default: a preset states them. Where a field has one it is the identity
    (no warm-up, no drop path), so that what a preset leaves out does not exist.
    """

    # Without "strings" pydantic writes inf as null, and a stored preset could not be read back.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    @classmethod
    def parse(cls, data: dict[str, Any], what: str) -> Self:
        """Validate `data`; a mistake names the first key that is wrong.

        Args:
            data: Nested plain values, as `tomllib` or `json` give them.
            what: What is being read, for the error line (`preset vits16`).

        Raises:
            DinoError: A key is unknown or missing, or a value is out of range.
        """
        if _deeper(data, _DEEPEST):
            raise DinoError(f"{what} is nested more than {_DEEPEST} levels deep", "mend its tables and lists")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise _explain(error.errors()[0], data, cls, what) from None


def change(data: dict[str, Any], override: str) -> None:
    """Put `key.path=value` into nested values: TOML, or a bare word for a string; `none` takes the key out.

    Raises:
        DinoError: It is no such assignment.
    """
    key, equals, value = override.partition("=")
    *tables, last = key.strip().split(".")
    if not equals or not last:
        raise DinoError(f"--set wants key.path=value; it is {override!r}", "for example --set training.epochs=10")
    for table in tables:
        if not isinstance(data.get(table, {}), dict):
            raise DinoError(f"--set {override}: {table} is a value and not a table", f"--set {table}=VALUE")
        data = data.setdefault(table, {})
    if value.strip() == "none":
        data.pop(last, None)
        return
    try:
        data[last] = tomllib.loads(f"value = {value}")["value"]
    except RecursionError:
        raise DinoError(f"--set {key.strip()}: its value is nested too deeply", "mend its brackets") from None
    except ValueError:  # no TOML, or a number of thousands of digits
        data[last] = value.strip()


def _deeper(data: object, levels: int) -> bool:
    """Return whether tables and lists are nested deeper than that, which would exhaust whoever reads them."""
    inside = [data]
    for _ in range(levels + 1):
        tables = [value for value in inside if isinstance(value, dict | list | tuple)]
        inside = [each for table in tables for each in (table.values() if isinstance(table, dict) else table)]
    return bool(inside)


def _explain(first: ErrorDetails, data: dict[str, Any], model: type[BaseModel], what: str) -> DinoError:
    # A discriminated union puts its tag into the location; only names that the data holds are keys of the user's.
    path = _data_path(first["loc"], data, first["type"])
    key = ".".join(path)
    if first["type"] == "extra_forbidden":
        known = _known_keys(model, data, path[:-1])
        close = ".".join([*path[:-1], nearest(path[-1], known)]) if known else ""
        hint = f"did you mean {close}?" if close else f"leave {key} out"
        return DinoError(f"{what}: there is no key {key}", hint)
    if first["type"] == "missing":
        return DinoError(f"{what}: the key {key} is missing", f"add it with --set {key}=VALUE")
    said = first["msg"].removeprefix("Value error, ")
    if not key:
        said, _, mend = said.partition("; it needs ")
        return DinoError(f"{what}: {said}", f"--set {mend}" if mend else "change it with --set KEY=VALUE")
    wanted = said.removeprefix("Input ") if said.startswith("Input should be ") else f"is not valid: {said}"
    came = repr(first["input"]) if not isinstance(first["input"], dict) else "that of another kind"
    return DinoError(f"{what}: {key} {wanted}; it is {came}", f"--set {key}=VALUE with a value that fits")


def _data_path(location: tuple[int | str, ...], data: Any, kind: str) -> list[str]:
    path: list[str] = []
    for i, part in enumerate(location):
        if isinstance(data, dict) and part in data:
            data = data[part]
        elif not (kind == "missing" and i == len(location) - 1):
            continue
        path.append(str(part))
    return path


def _known_keys(model: type[BaseModel], data: Any, path: list[str]) -> list[str]:
    """The keys that the table at `path` may hold; none where the table's own name is the user's to choose."""
    names = iter(path)
    for name in names:
        field = model.model_fields.get(name)
        inner = _models_in(field.annotation) if field else []
        if not field or not inner:
            return []
        data = data[name]
        if get_origin(field.annotation) is dict:
            chosen = next(names, None)
            if chosen is None:
                return []
            data = data[chosen]
        kinds = [m for m in inner if data.get("kind") in _kinds(m)]
        model = (kinds or inner)[0]
    return list(model.model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for arg in get_args(annotation) for m in _models_in(arg)]


def _kinds(model: type[BaseModel]) -> tuple[Any, ...]:
    return get_args(model.model_fields["kind"].annotation) if "kind" in model.model_fields else ()
